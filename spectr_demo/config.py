"""Settings of a router and of a run, the defaults, and where files go.

Settings are frozen and checked once. Every `SPECTR_` variable of the environment is read here.
"""

import difflib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import platformdirs

Weighting = Literal["equal", "softmax"]
Composition = Literal["parameters", "outputs"]
Kind = Literal["ban", "pin", "only"]

_PACKAGE = Path(__file__).resolve().parent
IS_INSTALLED = (_PACKAGE / "assets").is_dir()  # a wheel has the assets inside the package
ASSETS = (_PACKAGE if IS_INSTALLED else _PACKAGE.parent) / "assets"
# What is made goes to the checkout; from an installed package, to where the user is.
WORKPLACE = Path() if IS_INSTALLED else _PACKAGE.parent

# What answers where no router is named: the engine, the command line and the harness.
DEFAULT_ROUTER = "spectr-context"
# What is compared where no columns are named: no expert, all experts merged, SpectR as published,
# and the default. The page adds the expert that fits, which it chooses from the prompt.
DEFAULT_COLUMNS = ("base", "uniform", "spectr-paper", DEFAULT_ROUTER)
PAGE_COLUMNS = ("base", "single", *DEFAULT_COLUMNS[1:])

# What divides logits or scores. Numbers of float32 are too few beyond these.
TEMPERATURES = 1e-4, 1e4
_RANGE = "from 0.0001 to 10000"
MOST_SEED = 2**63 - 1  # what generators and files hold

_LIBRARIES = ("spectr-demo", "torch", "transformers", "peft", "bitsandbytes")


def cache_dir() -> Path:
    """Folder of everything that can be rebuilt: `SPECTR_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("SPECTR_CACHE") or platformdirs.user_cache_path("spectr-demo")
    return Path(chosen).expanduser()


def is_zero_gpu() -> bool:
    """Whether this is a Space that lends its GPU call by call."""
    return bool(os.environ.get("SPACES_ZERO_GPU"))


def space_id() -> str:
    """`OWNER/NAME` of the Space that this is; empty elsewhere."""
    return os.environ.get("SPACE_ID", "")


def base_from_environment() -> str | None:
    """Hub id or folder in `SPECTR_BASE_MODEL`; None stands for the embedded default."""
    return os.environ.get("SPECTR_BASE_MODEL") or None


def device_map_from_environment() -> str | None:
    """`SPECTR_DEVICE_MAP`: how accelerate spreads a base over devices, such as "auto"."""
    return os.environ.get("SPECTR_DEVICE_MAP") or None


def experts_from_environment() -> list[str]:
    """Adapter sources in `SPECTR_EXPERTS` (separated by commas); where unset, the shipped ones."""
    listed = [source.strip() for source in os.environ.get("SPECTR_EXPERTS", "").split(",")]
    return [source for source in listed if source] or shipped_experts()


def paper_data_from_environment() -> str | None:
    """`SPECTR_PAPER_DATA`: the folder of the data sets of the paper's tasks."""
    return os.environ.get("SPECTR_PAPER_DATA") or None


def has_metrics() -> bool:
    """`SPECTR_METRICS=1`: the servers tell Prometheus what they do."""
    return os.environ.get("SPECTR_METRICS") == "1"


def has_uploads() -> bool:
    """`SPECTR_UPLOADS`: whether visitors may change the experts for themselves, and upload some;
    unset, they may, but not on a Space."""
    return os.environ.get("SPECTR_UPLOADS", "" if space_id() else "1") == "1"


def hub_patterns() -> tuple[str, ...]:
    """`SPECTR_HUB_ALLOW`: repositories on the Hub of which visitors may add adapters, such as
    `owner/name` or `owner/*`, separated by commas; unset, none."""
    listed = [each.strip() for each in os.environ.get("SPECTR_HUB_ALLOW", "").split(",")]
    return tuple(each for each in listed if each)


def owner_token() -> str:
    """`SPECTR_OWNER_TOKEN`: who gives it on the page may change the experts of all; empty where
    nobody may."""
    return os.environ.get("SPECTR_OWNER_TOKEN", "")


def listens_here_only() -> bool:
    """Whether the page is served to this machine alone, as far as its settings say."""
    name = os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    return name in ("127.0.0.1", "localhost", "::1") and not space_id()


def shipped_experts() -> list[str]:
    """Folders of the experts under `assets/experts/`, by name."""
    return [str(path.parent) for path in sorted(ASSETS.glob("experts/*/adapter_config.json"))]


@cache
def library_versions() -> dict[str, str]:
    """Versions of this project and of the libraries that decide its numbers, by package name.

    A package that is not installed is left out: this project, where it runs from its folder.
    """
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not there: what was asked, what exists, what is nearest."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(
        f"unknown {kind} {name!r}; there is {', '.join(map(repr, known)) or 'none'}.{hint}"
    )


def _require(is_valid: bool, what: str, value: object, needed: str) -> None:
    if not is_valid:
        raise ValueError(f"{what} is {value!r:.60}; it must be {needed}")


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """What a router is made to do with one expert, to see what changes.

    kind: "ban" never uses it; "pin" always gives it one of the K places; "only" uses no other.
    from_token: the first token of each request's answer, from 0, that is read so; None is the whole
        run, prompt included. layers: the first and the last decoder layer; None is all of them.
    """

    kind: Kind
    expert: str
    from_token: int | None = None
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        kinds, t, layers = get_args(Kind), self.from_token, self.layers
        _require(self.kind in kinds, "intervention", self.kind, f"one of {kinds}")
        _require(t is None or (_is_int(t) and t >= 0), "from_token", t, "a whole number, from 0")
        is_range = layers is None or (
            len(layers) == 2 and all(map(_is_int, layers)) and 0 <= layers[0] <= layers[1]
        )
        _require(is_range, "layers", layers, "the first and the last layer, from 0")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How one column weighs the experts.

    name: a key of `routing.routers.ROUTERS`.
    expert: the one expert of `single`; None for every other router.
    top_k: experts per token and layer. None means the preset's number, or all experts if there
        are fewer; a number given here is taken literally, and must not exceed the experts loaded.
    temperature: divides the scores before the softmax (unused by equal weights).
    prefilter: experts that LAG's arrow filter keeps; unused by the other routers.
    calibrated: whether scores are standardised by what generic text gives, in standard deviations.
    confidence: for a router that reads the request: no expert is used where the best one stands
        out no more than in this share of ordinary prompts. None always uses one.
    intervention: what it is made to do with one expert; None leaves it alone.
    """

    name: str
    expert: str | None = None
    top_k: int | None = None
    weighting: Weighting = "equal"
    temperature: float = 1.0
    composition: Composition = "outputs"
    prefilter: int = 20
    calibrated: bool = False
    confidence: float | None = None
    intervention: Intervention | None = None

    def __post_init__(self) -> None:
        k, t, f = self.top_k, self.temperature, self.prefilter
        _require(k is None or (_is_int(k) and k >= 1), "top_k", k, "a whole number of at least 1")
        weightings, compositions = get_args(Weighting), get_args(Composition)
        _require(self.weighting in weightings, "weighting", self.weighting, f"one of {weightings}")
        _require(
            self.composition in compositions,
            "composition",
            self.composition,
            f"one of {compositions}",
        )
        low, high = TEMPERATURES
        _require(_is_number(t) and low <= t <= high, "router temperature", t, _RANGE)
        _require(_is_int(f) and f >= 1, "prefilter", f, "a whole number of at least 1")
        c = self.confidence
        _require(c is None or (_is_number(c) and 0 <= c <= 1), "confidence", c, "from 0 to 1")
        if (self.name == "single") != (self.expert is not None):
            raise ValueError(
                f"router {self.name!r} has expert {self.expert!r}; only 'single' names an expert, "
                "and it must: write 'single:NAME'"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How tokens are drawn, the same for all columns of a run.

    temperature: 0 is greedy. seed: draws the same noise for every column, so that columns differ
    only where their distributions do.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        n, t, p = self.max_new_tokens, self.temperature, self.top_p
        _require(_is_int(n) and n >= 1, "max_new_tokens", n, "a whole number of at least 1")
        low, high = TEMPERATURES
        is_fine = _is_number(t) and (t == 0 or low <= t <= high)
        _require(is_fine, "temperature", t, f"0 (greedy) or {_RANGE}")
        _require(_is_number(p) and 0 < p <= 1, "top_p", p, "above 0 and at most 1")
        _require(
            _is_int(self.seed) and 0 <= self.seed <= MOST_SEED,
            "seed",
            self.seed,
            f"a whole number from 0 to {MOST_SEED}",
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

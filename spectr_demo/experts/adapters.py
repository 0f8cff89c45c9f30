"""LoRA adapters: reading PEFT's folders safely.

All that is wrong with an adapter, or with several, is said in one error, in one line for each thing
that is wrong.
"""

import hashlib
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spectr_demo.experts.fields import HONOURED, refusals

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_KEY_PREFIX = "base_model.model."
# What torch puts into the names of modules that it compiles, shards or checkpoints.
_WRAPPER = re.compile(
    r"(?:(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)|^module)\."
)
# Tensors that an adapter does not need: of training, and the base's own embedding, which PEFT saves
# with factors of an embedding (and those are refused).
_UNUSED = (".lora_monteclora_sampler.", ".lora_velora_embed", ".base_layer.weight")
_FACTOR = re.compile(r"(.+)\.(lora_[AB])(?:\.(?!weight$)([^.]+))?(?:\.weight)?")
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


class AdapterError(ValueError):
    """Everything that is wrong with the adapters asked for, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, kw_only=True)
class LoraFactors:
    """One adapter at one layer: `scaling * lora_B @ lora_A` is added to the layer's weight."""

    lora_A: Tensor  # (r, D_in)
    lora_B: Tensor  # (D_out, r)
    scaling: float


class LoraShape(NamedTuple):
    """Of one adapter at one layer."""

    D_out: int
    D_in: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter that was read and found sound.

    sha256: of configuration and weights, in hex. num_bytes: of the weights.
    shapes: by the layer's path in the base model.
    read: gives the weights, by path too. They are not kept, since the library has its own.
    notes: what was done so that it fits, for people.
    """

    name: str
    source: str
    base_model: str
    sha256: str
    num_bytes: int
    shapes: Mapping[str, LoraShape]
    read: Callable[[], Mapping[str, LoraFactors]] = field(repr=False)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        factors: Mapping[str, LoraFactors],
        *,
        read: Callable[[], Mapping[str, LoraFactors]] | None = None,
        **facts: Any,
    ) -> "Adapter":
        """The adapter with these weights, which are kept where nothing can read them again."""
        return cls(
            num_bytes=sum(f.lora_A.nbytes + f.lora_B.nbytes for f in factors.values()),
            shapes={
                sys.intern(path): LoraShape(f.lora_B.shape[0], f.lora_A.shape[1], len(f.lora_A))
                for path, f in factors.items()
            },
            read=read or (lambda: factors),
            **facts,
        )

    @property
    def ranks(self) -> tuple[int, int]:
        """Smallest and largest rank over the layers."""
        ranks = [shape.rank for shape in self.shapes.values()]
        return min(ranks), max(ranks)

    @property
    def projections(self) -> list[str]:
        """Names of the projections it touches, such as `q_proj`, in the order of the file."""
        return list(dict.fromkeys(path.rpartition(".")[2] for path in self.shapes))

    def placed(self, places: Mapping[str, str], notes: Sequence[str]) -> "Adapter":
        """The same adapter with its layers at other paths; those that have no place are left out.

        places: by the path here, the path there.
        """
        return replace(
            self,
            shapes={sys.intern(places[p]): s for p, s in self.shapes.items() if p in places},
            read=partial(_read_placed, self.read, places),
            notes=(*self.notes, *notes),
        )


def _read_placed(
    read: Callable[[], Mapping[str, LoraFactors]], places: Mapping[str, str]
) -> dict[str, LoraFactors]:
    return {places[path]: factors for path, factors in read().items() if path in places}


def named_source(source: str | Path) -> tuple[str | None, str]:
    """The name that is given to an expert, and its folder or Hub id.

    `NAME=SOURCE` gives one. A folder's path may have an equals sign too, such as `runs/lr=1e-4`.
    """
    name, is_named, rest = str(source).partition("=")
    is_path = isinstance(source, Path) or Path(name).name != name or Path(source).exists()
    return (name, rest) if is_named and not is_path else (None, str(source))


def adapters_in(source: str | Path) -> list[str]:
    """The adapters in a folder of several, by name; any other source alone, as it is."""
    folder = Path(source).expanduser()
    if (folder / CONFIG_FILE).exists():
        return [str(source)]
    return sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_FILE}")) or [str(source)]


def read_adapter(source: str | Path, name: str | None = None) -> Adapter:
    """Read a PEFT LoRA adapter from a folder or from the Hub (`owner/repo` or `owner/repo/folder`).

    name: of the expert. None is the last part of the folder's or the repository's name.
    Weights are read from safetensors alone. Raises AdapterError with all that is wrong with it.
    """
    source = str(source)
    name = name or source.rstrip("/").rpartition("/")[2]
    folder = _resolve(source, name)
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(
            [f"expert {name!r}: {folder} has no {CONFIG_FILE}; it must be a PEFT adapter's folder"]
        )
    content = (folder / CONFIG_FILE).read_bytes()
    values = _read_values(content, folder, name)
    problems = [
        f"expert {name!r}: it uses {what}, which is not supported; train a plain LoRA adapter on "
        "linear layers"
        for what in refusals(values)
    ]
    try:
        state = _read_state(folder, name)
    except AdapterError as error:
        raise AdapterError(problems + error.problems) from None
    # What else such a configuration leads to is no fault of its own, and is not looked for.
    if problems := problems + _unsound(state, name):
        raise AdapterError(problems)
    config = _lora_config(values, name)
    factors, notes = _parse_factors(state, config, name)
    return Adapter.of(
        factors,
        read=partial(_read_factors, folder, config, name),
        name=name,
        source=source,
        base_model=values.get("base_model_name_or_path") or "an unnamed base",
        sha256=hashlib.sha256(content + (folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
        notes=notes,
    )


def _read_factors(folder: Path, config: LoraConfig, name: str) -> dict[str, LoraFactors]:
    return _parse_factors(_read_state(folder, name), config, name)[0]


def _read_state(folder: Path, name: str) -> dict[str, Tensor]:
    """The file's tensors by name, in one order each time. Those in float8 are widened: nothing is
    computed in it."""
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        pickles = [pickle for pickle in _PICKLES if (folder / pickle).is_file()]
        has = f"only pickled weights ({pickles[0]})" if pickles else "no weights"
        raise AdapterError(
            [
                f"expert {name!r}: {folder} has {has}; {WEIGHTS_FILE} is needed (loading a pickle "
                "can run any code): save the adapter again with safetensors"
            ]
        )
    try:
        state = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            [f"expert {name!r}: {weights} is corrupt or truncated ({error}); download it again"]
        ) from None
    try:
        return {
            key: tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
            for key, tensor in sorted(state.items())
        }
    except NotImplementedError as error:  # two numbers in a byte
        raise AdapterError(
            [f"expert {name!r}: torch cannot read its numbers ({error}); save it in bfloat16"]
        ) from None


def _resolve(source: str, name: str) -> Path:
    """The local folder of an adapter; one on the Hub is fetched (or found in the Hub's cache)."""
    folder = Path(source).expanduser()
    if folder.exists():
        return folder
    owner, _, rest = source.partition("/")
    repo, _, subfolder = rest.partition("/")
    if not repo or source.startswith((".", "/", "~")):
        raise AdapterError(
            [f"expert {name!r}: there is no folder {source}; give a folder or a Hub id owner/repo"]
        )
    from huggingface_hub import snapshot_download

    wanted = [f"{subfolder}/{file}" if subfolder else file for file in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        return Path(snapshot_download(f"{owner}/{repo}", allow_patterns=wanted)) / subfolder
    except (OSError, ValueError) as error:  # offline, no such repository, no access
        reason = str(error).strip().partition("\n")[0]
        raise AdapterError(
            [
                f"expert {name!r}: {source} is no folder here, and the Hub did not give it "
                f"({reason}); check the name and the network, or download it and give its folder"
            ]
        ) from None


def _read_values(content: bytes, folder: Path, name: str) -> dict[str, Any]:
    """What is in the configuration of an adapter that is LoRA."""
    try:
        values: dict[str, Any] = json.loads(content)
        peft_type = values.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise AdapterError(
            [f"expert {name!r}: {folder / CONFIG_FILE} is not a JSON object ({error})"]
        ) from None
    if peft_type != "LORA":
        raise AdapterError(
            [f"expert {name!r}: its peft_type is {peft_type!r}; only 'LORA' can be routed"]
        )
    return values


def _lora_config(values: Mapping[str, Any], name: str) -> LoraConfig:
    """PEFT's own reading of the fields that decide what the weights mean."""
    wrong = None
    try:
        config = LoraConfig(**{field: values[field] for field in HONOURED if field in values})
    except (TypeError, ValueError) as error:
        wrong = str(error)
    else:
        patterns = (config.rank_pattern or {}, config.alpha_pattern or {})
        numbers = [config.r, config.lora_alpha, *(n for p in patterns for n in p.values())]
        if not all(type(number) in (int, float) for number in numbers):
            wrong = f"its ranks and alphas must be numbers, among them are {numbers}"
        elif config.target_modules is None:
            wrong = "target_modules must name the layers"
        elif str(config.target_modules).lower() == "all-linear":
            config.target_modules = ".*"  # those that have factors
    if wrong:
        raise AdapterError(
            [f"expert {name!r}: PEFT refuses its {CONFIG_FILE} ({wrong}); save it again with PEFT"]
        )
    return config


def _unsound(state: Mapping[str, Tensor], name: str) -> list[str]:
    """What is wrong with the numbers, whatever they are for."""
    shards, others, infinite = [], [], []
    for key, tensor in state.items():
        is_factor = (".lora_A" in key or ".lora_B" in key) and not key.endswith(".bias")
        if is_factor and (tensor.dim() < 2 or not tensor.numel()):
            shards.append(f"{key} has shape {tuple(tensor.shape)}")
        elif is_factor and not tensor.is_floating_point():
            others.append(f"{key} holds {str(tensor.dtype).removeprefix('torch.')}")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            infinite.append(f"{key} holds NaN or infinite values")
    found = {
        "DeepSpeed ZeRO-3 and FSDP keep parts of a matrix, which were not gathered when it was "
        "saved: save it again gathered": shards,
        "floating point was needed: save it in bfloat16": others,
        "train it again": infinite,
    }
    return [
        f"expert {name!r}: {_first(tensors, 'tensors')}; {remedy}"
        for remedy, tensors in found.items()
        if tensors
    ]


def _first(found: Sequence[str], what: str) -> str:
    """The first of several, and how many there are."""
    return found[0] if len(found) == 1 else f"{found[0]} (as {len(found)} {what} do)"


def _parse_factors(
    state: Mapping[str, Tensor], config: LoraConfig, name: str
) -> tuple[dict[str, LoraFactors], tuple[str, ...]]:
    """The tensors paired by layer, with the scaling that PEFT gives; and notes on their names.

    Raises AdapterError with all that is wrong.
    """
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    names: dict[str, list[str]] = {}
    foreign, taken_out, adapter_names, is_twice = [], set(), set(), False
    for key, tensor in state.items():
        if any(part in key for part in _UNUSED):
            continue
        taken_out.update(_WRAPPER.findall(key))
        factor = _FACTOR.fullmatch(key)
        if not factor or tensor.dim() != 2:
            foreign.append(key)
            continue
        name_there, part, adapter_name = factor.groups()
        path = _WRAPPER.sub("", name_there).removeprefix(_KEY_PREFIX)
        names[path] = [path, name_there.removeprefix(_KEY_PREFIX)]
        adapter_names.add(adapter_name or "")
        is_twice |= part in pairs[path]
        pairs[path][part] = tensor
    if is_twice or len(adapter_names) > 1:
        listed = ", ".join(map(repr, sorted(adapter_names)))
        raise AdapterError(
            [
                f"expert {name!r}: its tensors are of several adapters (named {listed}); one was "
                "needed: save each in a folder of its own"
            ]
        )
    problems = []
    if foreign:
        kinds = {
            "embedding layers or ": any("embed" in key for key in foreign),
            "trained biases or ": any(key.endswith(".bias") for key in foreign),
        }
        found = "".join(kind for kind, is_there in kinds.items() if is_there)
        problems.append(
            f"expert {name!r}: {len(foreign)} tensors are no LoRA factors of a linear layer "
            f"({foreign[0]}, ...); {found}other parts than linear layers are not supported"
        )
    elif not pairs:
        problems.append(f"expert {name!r}: its {WEIGHTS_FILE} holds no LoRA factors; save it again")
    factors, misfits = _factors(pairs, names, config)
    problems += [f"expert {name!r}: {misfit}" for misfit in misfits]
    if problems:
        raise AdapterError(problems)
    taken_out |= {f"{adapter_name}." for adapter_name in adapter_names if adapter_name}
    listed = ", ".join(map(repr, sorted(taken_out)))
    notes = [f"expert {name!r}: {listed} was taken out of the names of its tensors"]
    return factors, tuple(notes if taken_out else ())


def _factors(
    pairs: Mapping[str, Mapping[str, Tensor]],
    names: Mapping[str, Sequence[str]],
    config: LoraConfig,
) -> tuple[dict[str, LoraFactors], list[str]]:
    """The factors with the scaling that PEFT gives, by layer; and what is wrong with the others.

    names: of each layer, by which the configuration may call it.
    """
    factors = {}
    halves, ranks, untargeted = [], [], []
    for path, pair in pairs.items():
        if len(pair) != 2:
            halves.append(f"{path} has only {next(iter(pair))}")
            continue
        A, B = pair["lora_A"], pair["lora_B"]
        rank = _matching(config.rank_pattern, names[path], config.r)
        if A.shape[0] != rank or B.shape[1] != rank:
            ranks.append(
                f"{path} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, but "
                f"{CONFIG_FILE} says rank {rank}"
            )
            continue
        if not any(check_target_module_exists(config, name) for name in names[path]):
            untargeted.append(f"{path} is not among the target modules of {CONFIG_FILE}")
            continue
        alpha = _matching(config.alpha_pattern, names[path], config.lora_alpha)
        scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        factors[path] = LoraFactors(lora_A=A, lora_B=B, scaling=scaling)
    found = {
        "it needs both": halves,
        "the two files do not belong together": ranks,
        "PEFT would leave it out; the two files do not belong together": untargeted,
    }
    problems = [
        f"{_first(layers, 'layers')}; {remedy}" for remedy, layers in found.items() if layers
    ]
    return factors, problems


def _matching(patterns: Mapping[str, Any] | None, names: Sequence[str], default: Any) -> Any:
    """The value of the first pattern that matches one of the names."""
    patterns = patterns or {}
    keys = (get_pattern_key(list(patterns), name) for name in names)
    return next((patterns[key] for key in keys if key in patterns), default)

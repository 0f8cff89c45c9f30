"""LoRA adapters: reading PEFT's folders safely.

All that is wrong with an adapter, or with several, is said in one error, in one line for each thing
that is wrong.
"""

import hashlib
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from torch import Tensor

from spectr_demo.experts.fields import refusals
from spectr_demo.experts.hub import CONFIG_FILE, MOST_CONFIG_BYTES, WEIGHTS_FILE, fetched
from spectr_demo.experts.messages import AdapterError, first, short, shown
from spectr_demo.experts.patterns import Clock, PatternError, Values
from spectr_demo.experts.settings import MOST_RANK, LoraSettings, faults
from spectr_demo.experts.stacked import PackedPlace
from spectr_demo.experts.weights import (
    FLOATS,
    TensorInfo,
    WeightsError,
    WeightsFile,
    parse_json,
)

MOST_LOOKED_THROUGH = 100_000_000  # bytes of a file that is refused already
MOST_WIDTH = 1 << 20  # inputs or outputs of a layer; the widest one of today's models has 106,496
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


class _Layer(NamedTuple):
    """Where a layer's factors are in the file, and what they are multiplied by."""

    lora_A: str
    lora_B: str
    shape: LoraShape
    scaling: float


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter that was read and found sound.

    sha256: of configuration and weights, in hex. num_bytes: of the weights.
    shapes: by the layer's path in the base model.
    read: gives the weights, by path too. They are not kept, since the library has its own.
    notes: what was done so that it fits, for people.
    is_lasting: whether what is made of it is kept on the disk, for the next start.
    packed: where its factors are aligned already; None where they are not.
    """

    name: str
    source: str
    base_model: str
    sha256: str
    num_bytes: int
    shapes: Mapping[str, LoraShape]
    read: Callable[[], Mapping[str, LoraFactors]] = field(repr=False)
    notes: tuple[str, ...] = ()
    is_lasting: bool = True
    packed: PackedPlace | None = field(default=None, repr=False)

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
        if all(places.get(path) == path for path in self.shapes):
            return self
        return replace(
            self,
            shapes={sys.intern(places[p]): s for p, s in self.shapes.items() if p in places},
            read=partial(_read_placed, self.read, places),
            notes=(*self.notes, *notes),
            packed=None,  # which has them at the old paths
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
    is_path = isinstance(source, Path) or Path(name).name != name or _is_there(Path(source))
    return (name, rest) if is_named and not is_path else (None, str(source))


def adapters_in(source: str | Path) -> list[str]:
    """The adapters in a folder of several, by name; any other source alone, as it is."""
    folder = local_folder(source)
    if folder is None or _is_there(folder / CONFIG_FILE):
        return [str(source)]
    return sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_FILE}")) or [str(source)]


def local_folder(source: str | Path) -> Path | None:
    """The folder that a source is; None where there is none."""
    try:
        folder = Path(source).expanduser()
    except RuntimeError:  # of a user that there is not
        return None
    return folder if _is_there(folder) else None


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long for any folder
        return False


# What keeps an adapter from a base, one line each.
Misfits = Callable[[Adapter], Sequence[str]]


def read_adapter(
    source: str | Path, name: str | None = None, misfits: Misfits = lambda adapter: ()
) -> Adapter:
    """Read a PEFT LoRA adapter from a folder or from the Hub (`owner/repo` or `owner/repo/folder`).

    name: of the expert. None is the last part of the folder's or the repository's name. misfits:
    asked before the numbers are read, which are the most of it.
    Weights are read from safetensors alone. Raises AdapterError with all that is wrong with it.
    """
    source = str(source)
    name = shown(name or source.rstrip("/").rpartition("/")[2])
    with _said_of(name):
        content, weights, adapter = _open(source, name)
    if problems := misfits(adapter):
        raise AdapterError(problems)
    with _said_of(name):
        digest = hashlib.sha256(content)
        if problems := _infinite(weights, digest):
            raise AdapterError(problems)
    return replace(adapter, sha256=digest.hexdigest())


@contextmanager
def _said_of(name: str) -> Iterator[None]:
    try:
        yield
    except AdapterError as error:
        problems = [f"expert {name!r}: {problem}" for problem in error.problems]
        raise AdapterError(problems) from None
    except OSError as error:
        what = f"{shown(error.filename)} cannot be read ({error.strerror})"
        raise AdapterError([f"expert {name!r}: {what}; check whose it is, and the disk"]) from None


def _open(source: str, name: str) -> tuple[bytes, WeightsFile, Adapter]:
    """The configuration, the weights, and the adapter, of whose weights only the header is read;
    its digest is still to come."""
    folder = _resolve(source)
    content = _config(folder)
    values = _values(content, folder)
    problems = [
        f"it uses {what}, which is not supported; train a plain LoRA adapter on linear layers"
        for what in refusals(values)
    ]
    clock = Clock()
    settings, wrong = _settings(values, clock)
    problems += wrong
    try:
        weights = _open_weights(folder)
    except AdapterError as error:
        raise AdapterError(problems + error.problems) from None
    problems += _unsound(weights.tensors)
    if problems or settings is None:
        # What else such files lead to is no fault of its own, and is not looked for.
        if weights.num_bytes <= MOST_LOOKED_THROUGH:
            problems += _infinite(weights, hashlib.sha256())
        raise AdapterError(problems)
    layers, notes = _layers(weights.tensors, settings, clock)
    keys = [key for layer in layers.values() for key in (layer.lora_A, layer.lora_B)]
    return (
        content,
        weights,
        Adapter(
            name=name,
            source=source,
            base_model=settings.base_model,
            sha256="",
            num_bytes=sum(weights.tensors[key].num_bytes for key in keys),
            shapes={sys.intern(path): layer.shape for path, layer in layers.items()},
            read=partial(_read_factors, weights, layers, name),
            notes=tuple(f"expert {name!r}: {note}" for note in notes),
        ),
    )


def _infinite(weights: WeightsFile, digest: Any) -> list[str]:
    """What is wrong with the numbers. digest: updated with the file."""
    found = [f"{name} holds NaN or infinite values" for name in weights.look_through(digest)]
    return [f"{first(found, 'tensors')}; train it again"] if found else []


def _read_factors(
    weights: WeightsFile, layers: Mapping[str, _Layer], name: str
) -> dict[str, LoraFactors]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers.values():
        D_out, D_in, rank = layer.shape
        shapes |= {layer.lora_A: (rank, D_in), layer.lora_B: (D_out, rank)}
    try:
        tensors = weights.read(shapes)
    except WeightsError as error:
        raise AdapterError([f"expert {name!r}: {error}"]) from None
    return {
        path: LoraFactors(
            lora_A=tensors[layer.lora_A], lora_B=tensors[layer.lora_B], scaling=layer.scaling
        )
        for path, layer in layers.items()
    }


def _resolve(source: str) -> Path:
    """The local folder of an adapter; one on the Hub is fetched (or found in the Hub's cache)."""
    folder = local_folder(source)
    if folder is not None:
        return folder
    if not source.partition("/")[2] or source.startswith((".", "/", "~")):
        raise AdapterError(
            [f"there is no folder {shown(source)}; give a folder or a Hub id owner/repo"]
        )
    return fetched(source)


def _config(folder: Path) -> bytes:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise AdapterError(
            [f"{shown(folder)} has no {CONFIG_FILE}; it must be a PEFT adapter's folder"]
        )
    size = file.stat().st_size
    if size > MOST_CONFIG_BYTES:
        raise AdapterError(
            [
                f"{shown(file)} has {size} bytes, at most {MOST_CONFIG_BYTES} are read; save it "
                "again with PEFT"
            ]
        )
    return file.read_bytes()


def _values(content: bytes, folder: Path) -> dict[str, Any]:
    """What is in the configuration of an adapter that is LoRA."""
    try:
        values = parse_json(content)
    except ValueError as error:
        raise AdapterError(
            [f"{shown(folder / CONFIG_FILE)} is not a JSON object ({shown(error)})"]
        ) from None
    if values.get("peft_type") != "LORA":
        raise AdapterError(
            [f"its peft_type is {short(values.get('peft_type'))}; only 'LORA' can be routed"]
        )
    return values


def _settings(values: Mapping[str, Any], clock: Clock) -> tuple[LoraSettings | None, list[str]]:
    """The fields that decide what the weights mean; or what is wrong with them."""
    try:
        return LoraSettings.of(values, clock), []
    except ValidationError as error:
        wrong = faults(values, error)
        return None, [f"PEFT refuses its {CONFIG_FILE} ({wrong}); save it again with PEFT"]


def _open_weights(folder: Path) -> WeightsFile:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickles = [pickle for pickle in _PICKLES if (folder / pickle).is_file()]
        has = f"only pickled weights ({pickles[0]})" if pickles else "no weights"
        raise AdapterError(
            [
                f"{shown(folder)} has {has}; {WEIGHTS_FILE} is needed (loading a pickle can run "
                "any code): save the adapter again with safetensors"
            ]
        )
    try:
        weights = WeightsFile.opened(file)
        weights.check_room()
    except WeightsError as error:
        raise AdapterError([str(error)]) from None
    return weights


def _unsound(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """What is wrong with the factors, whatever they are for, as far as the header says."""
    shards, others, strange, large = [], [], [], []
    for name, tensor in tensors.items():
        if not (".lora_A" in name or ".lora_B" in name) or name.endswith(".bias"):
            continue
        rank, width = min(tensor.shape, default=0), max(tensor.shape, default=0)
        if tensor.kind.startswith(("F4", "F6_")):  # several numbers share a byte
            strange.append(f"of {name} ({tensor.kind})")
        elif len(tensor.shape) < 2 or not rank:
            shards.append(f"{name} has shape {shown(tensor.shape)}")
        elif tensor.kind not in FLOATS:
            others.append(f"{name} holds {_type_name(tensor.kind)}")
        elif rank > MOST_RANK or width > MOST_WIDTH:
            large.append(f"{name} has shape {shown(tensor.shape)}")
    found = {
        "DeepSpeed ZeRO-3 and FSDP keep parts of a matrix, which were not gathered when it was "
        "saved: save it again gathered": shards,
        "floating point was needed: save it in bfloat16": others,
        f"a rank up to {MOST_RANK} and a width up to {MOST_WIDTH} can be read": large,
    }
    problems = [f"{first(named, 'tensors')}; {remedy}" for remedy, named in found.items() if named]
    if strange:
        problems.append(
            f"torch cannot read its numbers ({first(strange, 'tensors')}); save it in bfloat16"
        )
    return problems


def _type_name(kind: str) -> str:
    """`int8` of safetensors' `I8`."""
    return re.sub(r"^(I|U)(?=\d)", lambda m: {"I": "int", "U": "uint"}[m[1]], kind)


def _layers(
    tensors: Mapping[str, TensorInfo], settings: LoraSettings, clock: Clock
) -> tuple[dict[str, _Layer], tuple[str, ...]]:
    """The tensors paired by layer, with the scaling that PEFT gives; and notes on their names.

    Raises AdapterError with all that is wrong.
    """
    pairs: dict[str, dict[str, str]] = defaultdict(dict)  # names of the tensors
    names: dict[str, list[str]] = {}
    foreign, taken_out, adapter_names, twice = [], set(), set(), []
    for key, tensor in sorted(tensors.items()):
        if any(part in key for part in _UNUSED):
            continue
        taken_out.update(_WRAPPER.findall(key))
        factor = _FACTOR.fullmatch(key)
        if not factor or len(tensor.shape) != 2:
            foreign.append(key)
            continue
        name_there, part, adapter_name = factor.groups()
        path = _WRAPPER.sub("", name_there).removeprefix(_KEY_PREFIX)
        names[path] = [path, name_there.removeprefix(_KEY_PREFIX)]
        adapter_names.add(adapter_name or "")
        if part in pairs[path]:
            twice.append(f"{pairs[path][part]} and {key} are one factor")
        pairs[path][part] = key
    if len(adapter_names) > 1:
        listed = shown(", ".join(map(repr, sorted(adapter_names))))
        raise AdapterError(
            [
                f"its tensors are of several adapters (named {listed}); one was needed: save each "
                "in a folder of its own"
            ]
        )
    problems = []
    if twice:
        problems.append(f"{first(twice, 'pairs')}; save it again with one name for each")
    if foreign:
        kinds = {
            "embedding layers or ": any("embed" in key for key in foreign),
            "trained biases or ": any(key.endswith(".bias") for key in foreign),
        }
        found = "".join(kind for kind, is_there in kinds.items() if is_there)
        problems.append(
            f"{len(foreign)} tensors are no LoRA factors of a linear layer ({shown(foreign[0])}, "
            f"...); {found}other parts than linear layers are not supported"
        )
    elif not pairs:
        problems.append(f"its {WEIGHTS_FILE} holds no LoRA factors; save it again")
    try:
        layers, misfits = _paired(pairs, names, tensors, settings, clock)
    except PatternError as error:
        layers, misfits = {}, [f"{CONFIG_FILE}: {error}"]
    if problems := problems + misfits:
        raise AdapterError(problems)
    taken_out |= {f"{adapter_name}." for adapter_name in adapter_names if adapter_name}
    listed = ", ".join(map(repr, sorted(taken_out)))
    notes = [f"{shown(listed)} was taken out of the names of its tensors"]
    return layers, tuple(notes if taken_out else ())


def _paired(
    pairs: Mapping[str, Mapping[str, str]],
    names: Mapping[str, Sequence[str]],
    tensors: Mapping[str, TensorInfo],
    settings: LoraSettings,
    clock: Clock,
) -> tuple[dict[str, _Layer], list[str]]:
    """The layers with the scaling that PEFT gives; and what is wrong with the others.

    names: of each layer, by which the configuration may call it.
    """
    layers = {}
    targets = settings.targets(clock)
    of_rank = Values(settings.rank_pattern or {}, clock)
    of_alpha = Values(settings.alpha_pattern or {}, clock)
    halves, ranks, untargeted = [], [], []
    for path, pair in pairs.items():
        if len(pair) != 2:
            halves.append(f"{path} has only {next(iter(pair))}")
            continue
        A, B = tensors[pair["lora_A"]].shape, tensors[pair["lora_B"]].shape
        rank = of_rank.of(names[path], settings.r)
        if A[0] != rank or B[1] != rank:
            ranks.append(
                f"{path} has lora_A {A} and lora_B {B}, but {CONFIG_FILE} says rank {rank}"
            )
            continue
        if not any(map(targets.has, names[path])):
            untargeted.append(f"{path} is not among the target modules of {CONFIG_FILE}")
            continue
        alpha = of_alpha.of(names[path], settings.lora_alpha)
        scaling = alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank
        layers[path] = _Layer(
            pair["lora_A"], pair["lora_B"], LoraShape(B[0], A[1], rank), float(scaling)
        )
    found = {
        "it needs both": halves,
        "the two files do not belong together": ranks,
        "PEFT would leave it out; the two files do not belong together": untargeted,
    }
    problems = [f"{first(named, 'layers')}; {remedy}" for remedy, named in found.items() if named]
    return layers, problems

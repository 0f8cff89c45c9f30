"""Experts: reading PEFT adapters safely, checking them against the base, and stacking them.

An *adapter* is the file; an *expert* is what is routed to. Nothing is attached, and nothing is
left half-read, unless every adapter is sound: all that is wrong with all of them is one error.
"""

import hashlib
import json
import math
import os
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from spectr_demo.bank import ExpertBank, Zeros
from spectr_demo.config import cache_dir, unknown_name
from spectr_demo.memory import available_memory, zeros_on_disk
from spectr_demo.shared_inputs import shared_inputs
from spectr_demo.spectral import Aligned, align

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_ALIGNMENT_VERSION = 1  # part of the cache key: raise it when `align` changes its result
_KEY_PREFIX = "base_model.model."
# A library's share of the free memory on a CPU: up to which it is kept in float32, and up to which
# it is kept in memory at all.
FLOAT32_SHARE, MEMORY_SHARE = 0.25, 0.5
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
    """A LoRA adapter that was read and found sound. shapes: by the layer's path in the base model.
    read: gives the weights, by path too; they are not kept, since the library has its own."""

    name: str
    source: str
    base_model: str
    sha256: str
    num_bytes: int
    shapes: Mapping[str, LoraShape]
    read: Callable[[], Mapping[str, LoraFactors]] = field(repr=False)

    @classmethod
    def of(
        cls,
        factors: Mapping[str, LoraFactors],
        *,
        read: Callable[[], Mapping[str, LoraFactors]] | None = None,
        **facts: str,
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


def read_adapter(source: str, name: str | None = None) -> Adapter:
    """Read a PEFT LoRA adapter from a folder or from the Hub (`owner/repo` or `owner/repo/folder`).

    name: of the expert; the folder's or repository's last part where None.
    Raises AdapterError with all that is wrong with it. Weights are read from safetensors alone.
    """
    name = name or source.rstrip("/").rpartition("/")[2]
    folder = _resolve(source, name)
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(
            [f"expert {name!r}: {folder} has no {CONFIG_FILE}; it must be a PEFT adapter's folder"]
        )
    config, config_bytes = _read_config(folder, name)
    problems = _unsupported(config, name)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        pickles = [pickle for pickle in _PICKLES if (folder / pickle).is_file()]
        has = f"only pickled weights ({pickles[0]})" if pickles else "no weights"
        problems.append(
            f"expert {name!r}: {folder} has {has}; {WEIGHTS_FILE} is needed (loading a pickle can "
            "run any code): save the adapter again with safetensors"
        )
        raise AdapterError(problems)
    try:
        factors = _read_factors(weights, config, name)
    except AdapterError as error:
        problems += error.problems
    if problems:
        raise AdapterError(problems)
    return Adapter.of(
        factors,
        read=partial(_read_factors, weights, config, name),
        name=name,
        source=source,
        base_model=config.base_model_name_or_path or "an unnamed base",
        sha256=hashlib.sha256(config_bytes + weights.read_bytes()).hexdigest(),
    )


def _read_factors(weights: Path, config: LoraConfig, name: str) -> dict[str, LoraFactors]:
    try:
        state = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            [f"expert {name!r}: {weights} is corrupt or truncated ({error}); download it again"]
        ) from None
    factors, problems = _parse_factors(state, config, name)
    if problems:
        raise AdapterError(problems)
    return factors


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


def _read_config(folder: Path, name: str) -> tuple[LoraConfig, bytes]:
    content = (folder / CONFIG_FILE).read_bytes()
    try:
        values = json.loads(content)
        peft_type = values.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise AdapterError(
            [f"expert {name!r}: {folder / CONFIG_FILE} is not a JSON object ({error})"]
        ) from None
    if peft_type != "LORA":
        raise AdapterError(
            [f"expert {name!r}: its peft_type is {peft_type!r}; only 'LORA' can be routed"]
        )
    try:
        return LoraConfig.from_pretrained(str(folder)), content
    except (TypeError, ValueError) as error:
        raise AdapterError(
            [f"expert {name!r}: PEFT refuses its {CONFIG_FILE} ({error}); save it again with PEFT"]
        ) from None


def _unsupported(config: LoraConfig, name: str) -> list[str]:
    """What the adapter's configuration asks for that a weighting of LoRA factors cannot give."""
    init = config.init_lora_weights
    changes_base = isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda"))
    found = {
        "DoRA (use_dora)": config.use_dora,
        f"modules_to_save {config.modules_to_save}": config.modules_to_save,
        "biases (lora_bias)": config.lora_bias,
        f"trained biases (bias={config.bias!r})": config.bias != "none",
        "trainable_token_indices": config.trainable_token_indices,
        "target_parameters": config.target_parameters,
        "layer_replication": config.layer_replication,
        f"init_lora_weights={init!r}, which changes the base's own weights": changes_base,
    }
    return [
        f"expert {name!r}: it uses {what}, which is not supported; train a plain LoRA adapter "
        "on linear layers"
        for what, is_used in found.items()
        if is_used
    ]


def _parse_factors(
    state: Mapping[str, Tensor], config: LoraConfig, name: str
) -> tuple[dict[str, LoraFactors], list[str]]:
    """Pair the tensors by layer, with the scaling PEFT gives; and list what is wrong."""
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    problems, foreign = [], []
    for key, tensor in state.items():
        path, _, part = key.removesuffix(".weight").removeprefix(_KEY_PREFIX).rpartition(".")
        if part not in ("lora_A", "lora_B") or tensor.dim() != 2:
            foreign.append(key)
            continue
        pairs[path][part] = tensor
        if not tensor.isfinite().all():
            problems.append(f"expert {name!r}: {key} holds NaN or infinite values; train it again")
    if foreign:
        kinds = "embedding layers or " if any("embedding" in key for key in foreign) else ""
        problems.append(
            f"expert {name!r}: {len(foreign)} tensors are no LoRA factors of a linear layer "
            f"({foreign[0]}, ...); {kinds}other parts than linear layers are not supported"
        )
    if not pairs and not problems:
        problems.append(f"expert {name!r}: its {WEIGHTS_FILE} holds no LoRA factors; save it again")
    factors = {}
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    for path, pair in pairs.items():
        if len(pair) != 2:
            problems.append(f"expert {name!r}: {path} has only {next(iter(pair))}; it needs both")
            continue
        A, B = pair["lora_A"], pair["lora_B"]
        rank = ranks.get(get_pattern_key(list(ranks), path), config.r)
        if A.shape[0] != rank or B.shape[1] != rank:
            problems.append(
                f"expert {name!r}: {path} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, "
                f"but {CONFIG_FILE} says rank {rank}; the two files do not belong together"
            )
            continue
        alpha = alphas.get(get_pattern_key(list(alphas), path), config.lora_alpha)
        scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        factors[path] = LoraFactors(lora_A=A, lora_B=B, scaling=scaling)
    return factors, problems


def check_against_base(adapter: Adapter, model: PreTrainedModel) -> list[str]:
    """What keeps this adapter from being attached to this base: missing layers, other shapes."""
    modules = dict(model.named_modules())
    output = model.get_output_embeddings()
    missing, misfits, unsupported = [], [], []
    for path, shape in adapter.shapes.items():
        layer = modules.get(path)
        layer = getattr(layer, "base_layer", layer)  # already wrapped: look at what is inside
        if layer is None:
            missing.append(path)
        elif not isinstance(layer, nn.Linear) or layer is output:  # bnb's Linear4bit is a Linear
            kind = "the output embedding" if layer is output else type(layer).__name__
            unsupported.append(f"{path} ({kind})")
        else:
            if (shape.D_in, shape.D_out) != (layer.in_features, layer.out_features):
                misfits.append(
                    f"{path} has {shape.D_in} inputs and {shape.D_out} outputs, the base has "
                    f"{layer.in_features} and {layer.out_features}"
                )
    problems = []
    wrong_base = f"it was trained on another base model ({adapter.base_model})"
    if missing:
        problems.append(
            f"expert {adapter.name!r}: {len(missing)} of its {len(adapter.shapes)} layers are not "
            f"in the base ({missing[0]}, ...); {wrong_base}"
        )
    if misfits:
        problems.append(
            f"expert {adapter.name!r}: {misfits[0]} ({len(misfits)} layers differ); {wrong_base}"
        )
    if unsupported:
        problems.append(
            f"expert {adapter.name!r}: it targets {unsupported[0]} ({len(unsupported)} such "
            "layers); only linear layers inside the decoder can be routed"
        )
    return problems


def check_adapters(adapters: Sequence[Adapter], model: PreTrainedModel) -> list[str]:
    """What keeps these adapters from being one library on this base."""
    problems = [problem for a in adapters for problem in check_against_base(a, model)]
    for name, count in Counter(adapter.name for adapter in adapters).items():
        if count > 1:
            sources = ", ".join(a.source for a in adapters if a.name == name)
            problems.append(
                f"expert {name!r}: {count} adapters have this name ({sources}); give each its own, "
                "as NAME=SOURCE"
            )
    return problems


def align_adapter(adapter: Adapter) -> dict[str, Aligned]:
    """Spectral alignment of every layer, from the cache where this very adapter was aligned before.

    An unusable cache costs time, not the run: it is said once, as a warning.
    """
    cached = cache_dir() / "aligned" / f"{adapter.sha256}-v{_ALIGNMENT_VERSION}.safetensors"
    try:
        with safe_open(cached, "pt") as file:
            return {
                path: Aligned(file.get_tensor(f"{path}.A"), file.get_tensor(f"{path}.B"))
                for path in adapter.shapes
            }
    except (OSError, SafetensorError):
        pass  # never written, or cut short: align again
    aligned = align_in_groups(adapter)
    tensors = {
        f"{path}.{part}": t for path, a in aligned.items() for part, t in a._asdict().items()
    }
    unfinished = cached.with_suffix(f".{os.getpid()}")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished)
        unfinished.replace(cached)  # atomic: another process sees the whole file or none
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            unfinished.unlink()
        warnings.warn(
            f"expert {adapter.name!r}: its alignment could not be cached in {cached.parent} "
            f"({error}); it is computed at each start. Set SPECTR_CACHE to a writable folder",
            stacklevel=2,
        )
    return aligned


def align_in_groups(adapter: Adapter) -> dict[str, Aligned]:
    """Layers of one shape are aligned in one batched SVD."""
    groups = defaultdict(list)
    for path, shape in adapter.shapes.items():
        groups[shape].append(path)
    aligned, factors = {}, adapter.read()
    for paths in groups.values():
        layers = [factors[path] for path in paths]
        stacked = align(
            torch.stack([layer.lora_A for layer in layers]),
            torch.stack([layer.lora_B for layer in layers]),
            torch.tensor([layer.scaling for layer in layers]),
        )
        for path, A, B in zip(paths, stacked.A, stacked.B, strict=True):
            aligned[path] = Aligned(A, B)
    return aligned


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertLibrary:
    """The experts that are loaded, aligned and stacked by layer, ready to attach to their base."""

    adapters: tuple[Adapter, ...]
    aligned: tuple[Mapping[str, Aligned], ...] = field(repr=False)
    banks: tuple[ExpertBank, ...] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter in self.adapters)

    @cached_property
    def num_layers(self) -> int:
        return 1 + max((layer for bank in self.banks for layer in bank.layers), default=-1)

    @cached_property
    def projections(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for bank in self.banks for name in bank.projections))

    def places(self, bank: ExpertBank) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Layers and projections (P,) of a bank, as places in arrays with these two axes."""
        projections = [self.projections.index(name) for name in bank.projections]
        return np.array(bank.layers), np.array(projections)

    def index(self, name: str) -> int:
        if name not in self.names:
            raise unknown_name("expert", name, self.names)
        return self.names.index(name)

    @classmethod
    def from_adapters(cls, adapters: Sequence[Adapter], model: PreTrainedModel) -> "ExpertLibrary":
        """Check all adapters against the base, then align and stack them, one after another.

        Factors are in the model's own dtype on a GPU. On a CPU they are float32, in which small
        products are fastest; a library that would take too much of the memory so is kept in 16
        bits, and mapped from a file in the cache if that is too much too.
        Raises AdapterError with everything that does not fit.
        """
        if problems := check_adapters(adapters, model):
            raise AdapterError(problems)
        modules = dict(model.named_modules())
        touched = {path for adapter in adapters for path in adapter.shapes}
        dtype, zeros = _storage(adapters)
        banks = []
        for group in shared_inputs(model, [path for path in modules if path in touched]):
            together: dict[Any, list[str]] = defaultdict(list)
            for path in group:
                ids = tuple(e for e, adapter in enumerate(adapters) if path in adapter.shapes)
                together[ids, next(modules[path].parameters()).device].append(path)
            for (ids, device), paths in together.items():
                is_cpu = device.type == "cpu"
                bank = ExpertBank.empty(
                    paths,
                    ids,
                    max(adapters[e].shapes[path].rank for e in ids for path in paths),
                    [adapters[ids[0]].shapes[path][:2] for path in paths],
                    device=device,
                    dtype=dtype if is_cpu else model.dtype,
                    zeros=zeros if is_cpu else torch.zeros,
                )
                banks.append(bank)
        places = [{e: i for i, e in enumerate(bank.expert_ids.tolist())} for bank in banks]
        for e, adapter in enumerate(tqdm(adapters, "aligning", disable=len(adapters) < 50)):
            aligned = align_adapter(adapter)
            for bank, place in zip(banks, places, strict=True):
                if e in place:
                    bank.put_(place[e], [aligned[path] for path in bank.paths])
        where = {
            path: (bank, p, place)
            for bank, place in zip(banks, places, strict=True)
            for p, path in enumerate(bank.paths)
        }
        return cls(
            adapters=tuple(adapters),
            aligned=tuple(_Stacked(e, a.shapes, where) for e, a in enumerate(adapters)),
            banks=tuple(banks),
        )


class _Stacked(Mapping[str, Aligned]):
    """An expert's factors by layer, as they are in the banks."""

    def __init__(
        self,
        expert: int,
        shapes: Mapping[str, LoraShape],
        where: Mapping[str, tuple[ExpertBank, int, Mapping[int, int]]],
    ) -> None:
        """where: by layer, its bank, its place in it, and those of the experts."""
        self._expert, self._shapes, self._where = expert, shapes, where

    def __getitem__(self, path: str) -> Aligned:
        rank = self._shapes[path].rank
        bank, place, experts = self._where[path]
        return bank.factors(experts[self._expert], place, rank)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _storage(adapters: Sequence[Adapter]) -> tuple[torch.dtype, Zeros]:
    """How factors are kept on a CPU: their dtype, and what makes their tensors."""
    layers = [shape for adapter in adapters for shape in adapter.shapes.values()]
    num_values = sum(shape.rank * (shape.D_in + shape.D_out) for shape in layers)
    free = available_memory()
    if num_values * torch.float32.itemsize <= FLOAT32_SHARE * free:
        return torch.float32, torch.zeros
    if num_values * torch.bfloat16.itemsize <= MEMORY_SHARE * free:
        return torch.bfloat16, torch.zeros

    def zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return zeros_on_disk(shape, dtype, cache_dir() / "banks")

    return torch.bfloat16, zeros


def load_experts(sources: Sequence[str], model: PreTrainedModel) -> ExpertLibrary:
    """Read, check, align and stack adapters. sources: folders or Hub ids, `NAME=SOURCE` to rename.

    Raises one AdapterError that lists everything wrong with all of them.
    """
    adapters, problems = [], []
    for source in sources:
        name, is_named, path = source.partition("=")
        try:
            adapters.append(read_adapter(path, name) if is_named else read_adapter(source))
        except AdapterError as error:
            problems += error.problems
    if problems:
        raise AdapterError(problems + check_adapters(adapters, model))
    return ExpertLibrary.from_adapters(adapters, model)

"""LoRA adapters: reading PEFT's folders safely, and checking them against the base.

All that is wrong with an adapter, or with several, is said in one error.
"""

import hashlib
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_KEY_PREFIX = "base_model.model."
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
    """

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

    name: of the expert. None is the last part of the folder's or the repository's name.
    Weights are read from safetensors alone. Raises AdapterError with all that is wrong with it.
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

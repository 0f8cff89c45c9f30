"""A tiny random Llama with a byte-like tokenizer, and random PEFT experts for it; no network."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# Where tests run side by side, as gw0, gw1, ..., none takes another's ports or cores.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["GRADIO_SERVER_PORT"] = str(7900 + 100 * int(worker.removeprefix("gw")))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

# Kernels of a GPU are tested in Triton's interpreter, which must be chosen before Triton is
# imported. PEFT imports it.
if not torch.cuda.is_available():
    with suppress(ImportError), pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        import triton  # noqa: F401

from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spectr_demo.base import generic
from spectr_demo.base.loading import LoadedBase
from spectr_demo.config import cache_dir
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.library import ExpertLibrary, load_experts
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import ROUTERS

SLOW_SECONDS = 1200  # of one slow test, before it counts as hanging
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EXPERT_NAMES = ("red", "green", "blue")
# Without a confidence: to random experts no prompt is nearer than the generic ones.
IN_CONTEXT = replace(ROUTERS["spectr-context"].preset, confidence=None)


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser's tests are slow, and slow tests have a timeout of their own."""
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker("slow")
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the two chat markers: every text has an encoding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llama(vocab_size: int, num_layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer))


@pytest.fixture(scope="session")
def base_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The tiny base as `save_pretrained` writes it; tests only read it."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Of what another thread does soon."""
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


SaveExpert = Callable[..., str]


def banks_by_path(library: ExpertLibrary) -> dict[str, ExpertBank]:
    """The experts of each layer alone."""
    return {bank.paths[0]: bank for shared in library.banks for bank in shared.split()}


@pytest.fixture(scope="session")
def save_expert(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> SaveExpert:
    """A function that saves a random PEFT adapter and returns its folder."""

    def save(
        name: str,
        *,
        seed: int = 0,
        r: int = 4,
        target_modules: Sequence[str] = PROJECTIONS,
        folder: Path | None = None,
        size: float = 0.2,
        **config: object,
    ) -> str:
        model = get_peft_model(
            tiny_llama(len(tokenizer)),
            LoraConfig(r=r, target_modules=list(target_modules), task_type="CAUSAL_LM", **config),
        )
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = size * torch.randn(parameter.shape, generator=generator)
        path = (folder or tmp_path_factory.mktemp("experts")) / name
        model.save_pretrained(path)
        return str(path)

    return save


@pytest.fixture(scope="session")
def expert_folders(save_expert: SaveExpert) -> list[str]:
    return [save_expert(name, seed=seed) for seed, name in enumerate(EXPERT_NAMES)]


BuildModel = Callable[..., SpectrModel]


def loaded_base(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str = "tiny"
) -> LoadedBase:
    """A dense float32 base, as `load_base` would give it. name: its fingerprint too."""
    return LoadedBase(
        model=model,
        tokenizer=tokenizer,
        source=name,
        name=name,
        quantization="none",
        bits=32,
        compute_dtype=torch.float32,
        fingerprint=name,
    )


def _build_model(tokenizer: PreTrainedTokenizerFast, folders: Sequence[str]) -> SpectrModel:
    model = tiny_llama(len(tokenizer))
    return SpectrModel(loaded_base(model, tokenizer), load_experts(folders, model))


@pytest.fixture(scope="session")
def build_model(tokenizer: PreTrainedTokenizerFast) -> BuildModel:
    """A function from expert folders to a routed tiny model."""
    return partial(_build_model, tokenizer)


@pytest.fixture
def routed_model(build_model: BuildModel, expert_folders: list[str]) -> SpectrModel:
    return build_model(expert_folders)


@pytest.fixture(autouse=True)
def cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    """Each test has an empty cache of its own, but those that use the embedded default."""
    if "embedded" in request.keywords:
        return cache_dir()
    monkeypatch.setenv("SPECTR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def shipped_prompts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The tiny base has generic prompts that are shipped: to write them takes it a second."""
    if "embedded" not in request.keywords:
        shipped = Path(__file__).with_name("generic_text.json")
        monkeypatch.setattr(generic, "GENERIC_TEXT", shipped)


@pytest.fixture
def paper_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MRPC of the paper's tasks: eight training rows and four held-out ones."""
    folder = tmp_path / "data" / "mrpc"
    folder.mkdir(parents=True)
    rows = [
        {"sentence1": f"It is {i}.", "sentence2": f"So it is {i % 3}.", "label": i % 2, "idx": i}
        for i in range(12)
    ]
    for split, part in {"train": rows[:8], "validation": rows[8:]}.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setenv("SPECTR_PAPER_DATA", str(folder.parent))

"""What a run is said to take: exact counts, memory that grows with the work, no weights."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from spectr_demo.training import cost as training_cost
from spectr_demo.training.cost import LORA_BYTES, TrainingCost, estimate_training
from tests.conftest import PROJECTIONS, tiny_llama

MEASURE_SPEED = training_cost._matmul_speed
SPEED = 1e9
FREE = 10**9
# By hand: attention 2 * 64 * 64 + 2 * 64 * 32, MLP 3 * 64 * 128, norms 2 * 64; 2 layers.
LINEAR = 2 * (12_288 + 24_576)
PARAMETERS = LINEAR + 2 * 128 + 64 + 2 * 100 * 64  # with a last norm, an embedding and a head
COST = TrainingCost(
    memory=2 * 10**9, free_memory=8 * 10**9, seconds=150, num_parameters=134_500_000
)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known speed and memory; its GPU need not be there."""
    monkeypatch.setattr(training_cost, "_matmul_speed", lambda device: SPEED)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * FREE, 8 * FREE))


def tiny_config(**changes: object) -> PreTrainedConfig:
    config = tiny_llama(100).config
    config.update(changes)
    return config


def estimate(config: PreTrainedConfig | None = None, **changes: object) -> TrainingCost:
    arguments: dict[str, object] = {
        "rank": 8,
        "tokens_per_step": 100,
        "answer_tokens_per_step": 10,
        "tokens_at_once": 1000,
        "num_steps": 50,
        "device": torch.device("cpu"),
        **changes,
    }
    return estimate_training(config or tiny_config(), **arguments)  # type: ignore[arg-type]


def test_parameters_are_exact() -> None:
    assert estimate().num_parameters == PARAMETERS
    assert sum(p.numel() for p in tiny_llama(100).parameters()) == PARAMETERS


def test_a_tied_head_is_counted_once() -> None:
    tied = tiny_config(tie_word_embeddings=True)
    assert estimate(tied).num_parameters == PARAMETERS - 100 * 64


def test_a_rank_costs_what_its_lora_weights_do() -> None:
    lora = LoraConfig(r=2, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    trained, _ = get_peft_model(tiny_llama(100), lora).get_nb_trainable_parameters()
    assert estimate(rank=10).memory - estimate(rank=8).memory == LORA_BYTES * trained


def test_memory_grows_with_the_tokens_and_holds_the_weights() -> None:
    plain = estimate()
    assert plain.memory > 4 * PARAMETERS
    more, most = (estimate(tokens_per_step=tokens).memory for tokens in (200, 300))
    assert 0 < more - plain.memory == most - more
    assert estimate(answer_tokens_per_step=20).memory > plain.memory


def test_a_batch_that_is_taken_in_parts_needs_the_memory_of_one() -> None:
    whole = estimate(tokens_per_step=200, answer_tokens_per_step=20)
    parts = estimate(tokens_per_step=200, answer_tokens_per_step=20, tokens_at_once=100)
    assert parts.memory == estimate().memory < whole.memory
    assert parts.seconds == whole.seconds


def test_on_a_gpu_layers_take_four_bits_and_its_own_memory_counts() -> None:
    cpu, gpu = estimate(), estimate(device=torch.device("cuda"))
    assert gpu.memory < cpu.memory - 3 * LINEAR
    assert (cpu.free_memory, gpu.free_memory) == (FREE, 7 * FREE)


def test_time_is_operations_by_speed() -> None:
    # Forward and backward, 2 operations a weight each, and the head on answers alone.
    operations = 50 * 4 * (100 * LINEAR + 10 * 100 * 64)
    share = training_cost.MATMUL_SHARE
    assert estimate().seconds == pytest.approx(operations / (share * SPEED))
    assert estimate(num_steps=100).seconds == pytest.approx(2 * estimate().seconds)


def test_a_base_of_a_billion_is_estimated_without_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[torch.nn.Module] = []
    from_config = AutoModelForCausalLM.from_config

    def remembered(config: PreTrainedConfig, **options: bool) -> torch.nn.Module:
        built.append(from_config(config, **options))
        return built[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", remembered)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    cost = estimate(config)
    assert cost.num_parameters == 1_235_814_400  # Llama 3.2 1B's
    assert "TOO LITTLE" in str(cost)
    assert all(weight.is_meta for model in built for weight in model.parameters())


def test_the_configuration_is_left_as_it_was() -> None:
    config = tiny_config()
    before = config.to_dict()
    estimate(config)
    assert config.to_dict() == before


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"memory.max": "3000", "memory.current": "1000"}
    monkeypatch.setattr(Path, "read_text", lambda path: limits[path.name])
    assert estimate().free_memory == 2000
    assert estimate(device=torch.device("cuda")).free_memory == 7 * FREE


def test_text_says_what_is_needed_and_what_there_is() -> None:
    text = str(COST)
    assert text.startswith("134M parameters; about 2.0 GB needed of 8.0 GB free; about 2 min")
    assert "TOO LITTLE" not in text


def test_text_says_where_memory_is_short() -> None:
    text = str(replace(COST, memory=9 * 10**9))
    assert "9.0 GB needed of 8.0 GB free: TOO LITTLE, lower --batch-size" in text


def test_a_short_run_is_not_said_to_take_no_time() -> None:
    assert "about 1 min" in str(replace(COST, seconds=2))


def test_the_speed_of_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_cost, "PROBE_SECONDS", 0.01)
    assert MEASURE_SPEED(torch.device("cpu")) > 1e8

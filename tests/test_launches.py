"""What a GPU has to launch, and that it never waits for the host: counted and tried without one."""

import copy

import pytest
import torch

from benchmarks.launches import ROUTERS, count
from benchmarks.random_models import SHAPES, random_base, random_library, random_plan
from spectr_demo.engine.layers import attach_, follow, routed
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.static import static_cache

LAYERS, BANKS = 14, 8  # of two decoder layers: 7 linear layers each, in 4 groups of one input


def test_a_token_launches_two_kernels_for_a_bank_of_one_layer() -> None:
    """One for each bank, and one for each layer. A record takes a copy and a count more."""
    for row in count("tiny"):
        added = row["token"] - row["token, base"]
        head = 1  # its input is copied on a CPU
        assert added <= BANKS + LAYERS + head + 2 * row["recorded"], row


def test_a_prompt_launches_few_more() -> None:
    """One to choose and some to record, for each bank, beside those of its token."""
    for row in count("tiny"):
        if not row["router"].startswith(("single", "uniform", "spectr-c")):  # they prepare weights
            added = row["prompt"] - row["prompt, base"]
            assert added <= (2 + 3 * row["recorded"]) * BANKS + LAYERS + 10, row


@pytest.fixture(params=["Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Qwen3-8B"])
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("num_experts", [10, 1000])
def test_nothing_waits_for_the_device(shape: str, num_experts: int) -> None:
    """On the device `meta` no tensor has a value. Who asks for one, or mixes in a tensor of the
    CPU, is told so by an error."""
    config = copy.deepcopy(SHAPES[shape])
    config.num_hidden_layers = 2  # the others are like them
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    model = random_base(config, torch.device("meta"))
    library = random_library(model, num_experts)
    attach_(model, library)
    follow(model)
    for router in ROUTERS:
        for recorder in (None, Recorder(2)):
            plan = random_plan(library, router, 3, recorder)
            cache = static_cache(model, 70)
            with torch.inference_mode(), routed(plan):
                for num_tokens in (64, 1, 1):
                    ids = torch.zeros(3, num_tokens, dtype=torch.long, device="meta")
                    output = model(input_ids=ids, past_key_values=cache)
            assert output.logits.shape == (3, 1, SHAPES[shape].vocab_size)
            assert output.logits.device.type == "meta"

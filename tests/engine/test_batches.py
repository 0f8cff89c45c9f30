"""Several texts at once, on bases that keep keys and values, a state, both, or nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Gemma2Config,
    MambaConfig,
    OpenAIGPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from spectr_demo.engine import batches
from spectr_demo.engine.batches import check_rows, has_attention_alone, read_after
from spectr_demo.engine.layers import follow
from spectr_demo.engine.reading import Listening

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MAMBA = {"mamba_n_heads": 2, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 8}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma2": lambda: Gemma2Config(
        **SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=16, sliding_window=4
    ),
    "bamba": lambda: BambaConfig(
        **SIZES, **MAMBA, intermediate_size=64, num_key_value_heads=2, attn_layer_indices=[1]
    ),
    "qwen3_5": lambda: Qwen3_5TextConfig(
        **SIZES,
        **DELTA,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "mamba": lambda: MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(
        **SIZES, intermediate_size=64, lru_width=32, block_types=["recurrent", "attention"]
    ),
    "rwkv": lambda: RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
    "openai-gpt": lambda: OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2),
}
BEGINNING = [5, 9, 2, 7, 11, 3]


@pytest.fixture(scope="module")
def bases() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    models = {name: AutoModelForCausalLM.from_config(make()) for name, make in CONFIGS.items()}
    for model in models.values():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data = 0.3 * torch.randn(weight.shape)
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


def last_hidden(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model.get_decoder()(torch.tensor([ids]), use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_read_after_one_beginning(name: str, bases: dict[str, PreTrainedModel]) -> None:
    """As each would be alone, whatever the base keeps of the beginning."""
    model = bases[name]
    rows = [[[1, 2, 3, 4, 6], [8, 9, 10, 12, 13]], [[4, 3]], [[], []]]
    for beginning in (BEGINNING, []):
        some = [(torch.tensor(ids, dtype=torch.long), None) for ids in rows if ids[0] or beginning]
        for (ids, _), hidden in zip(some, read_after(model, beginning, some), strict=True):
            assert hidden.shape[1] == len(beginning) + ids.shape[1]
            for row, found in zip(ids.tolist(), hidden, strict=True):
                assert_close(found, last_hidden(model, beginning + row), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "num_passes"), [("gemma2", [6, 2, 2]), ("bamba", [8, 8]), ("mamba", [8, 8])]
)
def test_the_beginning_is_read_once_where_keys_and_values_tell_all(
    name: str, num_passes: list[int], bases: dict[str, PreTrainedModel]
) -> None:
    model, widths = bases[name], []
    assert has_attention_alone(model) == (name == "gemma2")
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = torch.tensor([[1, 2], [3, 4]])
    list(read_after(model, BEGINNING, [(ids, None), (ids, None)]))
    hook.remove()
    assert widths == num_passes


def test_a_plan_is_not_left_behind_between_two_batches(bases: dict[str, PreTrainedModel]) -> None:
    class Count(Listening):
        num_passes = 0

        def begin_pass(self, input_ids: Tensor) -> None:
            self.num_passes += 1

    model, plan = bases["gemma2"], Count()
    hooks, ids = follow(model), torch.tensor([[1, 2]])
    for _ in read_after(model, BEGINNING, [(ids, plan), (ids, plan)]):
        num = plan.num_passes
        last_hidden(model, [1, 2])
        assert plan.num_passes == num
    assert plan.num_passes == 2
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["gemma2", "bamba", "qwen3_5", "mamba", "openai-gpt"])
def test_rows_of_any_length_run_side_by_side(name: str, bases: dict[str, PreTrainedModel]) -> None:
    check_rows(bases[name], [7, 7])
    check_rows(bases[name], [7, 4, 12])


def test_what_takes_in_padding_is_refused(bases: dict[str, PreTrainedModel]) -> None:
    model = bases["recurrent_gemma"]
    check_rows(model, [7])
    check_rows(model, [7, 7])
    message = "texts of 4 to 7 tokens .* RecurrentGemmaForCausalLM takes in what pads the shorter"
    with pytest.raises(ValueError, match=message):
        check_rows(model, [7, 4])


def test_what_mixes_up_rows_is_refused(bases: dict[str, PreTrainedModel]) -> None:
    """transformers' RWKV adds up the states of the rows from the second token on."""
    check_rows(bases["rwkv"], [7])
    with pytest.raises(
        ValueError, match="RwkvForCausalLM mixes up the rows of a batch, and 2 rows"
    ):
        check_rows(bases["rwkv"], [7, 7])


def test_rows_are_tried_out_once(
    bases: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[bool] = []
    monkeypatch.setattr(batches, "_are_independent", {})
    monkeypatch.setattr(batches, "_try_rows", lambda model, padded: not tried.append(padded))
    check_rows(bases["gemma2"], [7, 4])
    assert tried == []
    for lengths in ([7], [7, 7], [7, 7], [7, 4], [7, 4]):
        check_rows(bases["mamba"], lengths)
    assert tried == [False, True]

"""Static merges: the same tensors as PEFT's own merge of the same adapters."""

from collections.abc import Sequence

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from spectr_demo.evaluation.merging import DENSITY, dare_merge, ties_merge
from spectr_demo.experts.adapters import read_adapter
from tests.conftest import SaveExpert, tiny_llama


def test_ties_equals_pefts_merge(
    expert_folders: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = PeftModel.from_pretrained(tiny_llama(len(tokenizer)), expert_folders[0], "0")
    for i, folder in enumerate(expert_folders[1:], start=1):
        model.load_adapter(folder, str(i))
    model.add_weighted_adapter(
        ["0", "1", "2"], [1.0] * 3, "ties", combination_type="ties", density=DENSITY
    )
    merged = ties_merge([read_adapter(folder) for folder in expert_folders])
    modules = dict(model.get_base_model().named_modules())
    assert merged.read()
    for path, factors in merged.read().items():
        layer = modules[path]
        expected = layer.get_delta_weight("ties")
        torch.testing.assert_close(factors.lora_B @ factors.lora_A, expected, atol=1e-5, rtol=1e-4)


def test_dare_follows_its_seed_and_leaves_the_global_one(expert_folders: Sequence[str]) -> None:
    adapters = [read_adapter(folder) for folder in expert_folders]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = dare_merge(adapters, 0), dare_merge(adapters, 0), dare_merge(adapters, 1)
    torch.testing.assert_close(torch.rand(3), expected)
    path = next(iter(one.read()))
    assert torch.equal(one.read()[path].lora_A, again.read()[path].lora_A)
    assert not torch.equal(one.read()[path].lora_A, other.read()[path].lora_A)
    assert one.sha256 == again.sha256 != other.sha256


def test_adapters_of_two_ranks_are_refused(
    save_expert: SaveExpert, expert_folders: Sequence[str]
) -> None:
    adapters = [read_adapter(expert_folders[0]), read_adapter(save_expert("wide", r=8))]
    with pytest.raises(ValueError, match=r"ranks \[4, 8\].*need one rank"):
        ties_merge(adapters)

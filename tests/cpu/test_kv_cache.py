"""The KV cache that grows in place, against transformers' own."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from spectr_demo.cpu.kv_cache import GrowingLayer, grow_in_place_

steps = st.one_of(
    st.tuples(st.just("add"), st.sampled_from([1, 1, 1, 5, 200])),
    st.tuples(st.just("crop"), st.integers(0, 3)),
    st.tuples(st.just("repeat"), st.just(2)),
    st.tuples(st.just("select"), st.just(0)),
)


def states(num_rows: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num_rows, 2, num_tokens, 3), torch.randn(num_rows, 2, num_tokens, 4)


@settings(deadline=None)
@given(chosen=st.lists(steps, max_size=12))
def test_it_has_what_transformers_own_has(chosen: list[tuple[str, int]]) -> None:
    torch.manual_seed(0)
    cache = DynamicCache()
    cache.update(*states(1, 3), 0)
    expected, layer = DynamicLayer(), cache.layers[0]
    expected.update(layer.keys, layer.values)
    grow_in_place_(cache)
    assert type(layer) is GrowingLayer
    for step, number in chosen:
        if step == "add":
            new = states(len(expected.keys), number)
            both = layer.update(*new), expected.update(*new)
            assert all(torch.equal(*pair) for pair in zip(*both, strict=True))
        elif step == "crop" and expected.get_seq_length() > number:
            for each in (layer, expected):
                each.crop(-number)
        elif step == "repeat" and len(expected.keys) < 5:
            for each in (layer, expected):
                each.batch_repeat_interleave(number)
        elif step == "select":
            for each in (layer, expected):
                each.batch_select_indices(torch.tensor([number]))
    assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)
    assert layer.get_seq_length() == expected.get_seq_length()


def test_a_token_copies_nothing() -> None:
    layer = GrowingLayer()
    layer.update(*states(2, 100))
    places = layer.keys.data_ptr(), layer.values.data_ptr()
    for _ in range(100):
        layer.update(*states(2, 1))
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == places
    layer.reset()
    layer.update(*states(1, 2))
    assert layer.keys.shape == (1, 2, 2, 3)


def test_layers_with_a_window_stay() -> None:
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(8), DynamicLayer()]
    grow_in_place_(cache)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, GrowingLayer]

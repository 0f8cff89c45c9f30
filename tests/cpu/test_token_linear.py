"""Compiled products of a few tokens against torch's, and where torch computes."""

import time

import numba
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from spectr_demo.cpu import linear as cpu_linear
from spectr_demo.cpu import products, threads
from spectr_demo.cpu.linear import TokenLinear, is_faster, make_token_linear_

LARGE = (500, 300)  # more than one thread's share


def token_layer(D_out: int, D_in: int, bias: bool = False) -> TokenLinear:
    torch.manual_seed(0)
    return TokenLinear(D_in, D_out, bias=bias).requires_grad_(False)


@pytest.fixture
def no_compiled_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiply_in_threads", pytest.fail)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (3,), (2, 1, 4), ()], ids=str)
@pytest.mark.parametrize("sizes", [(64, 64), (7, 5), (1, 1), LARGE], ids=str)
def test_it_computes_what_linear_does(
    sizes: tuple[int, int], shape: tuple[int, ...], bias: bool
) -> None:
    layer = token_layer(*sizes, bias=bias)
    x = torch.randn(*shape, sizes[1])
    y = layer(x)
    assert y.shape == (*shape, sizes[0])
    assert_close(y, linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
    assert not torch.equal(layer(2 * x), y)


@torch.no_grad()
def test_a_slice_of_a_prompt_is_read_as_it_is() -> None:
    layer, prompts = token_layer(64, 64), torch.randn(4, 9, 64)
    last = prompts[:, -1:]
    assert not last.is_contiguous()
    assert_close(layer(last), linear(last, layer.weight), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num", [2, 3, 8])
def test_a_token_does_not_depend_on_its_neighbours(num: int) -> None:
    """Bit for bit, so a column's text is the same alone and beside others."""
    layer, x = token_layer(*LARGE), torch.randn(num, 1, LARGE[1])
    together = layer(x)
    for row in range(num):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


@torch.no_grad()
@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    layer, x = token_layer(4001, 64), torch.randn(3, 1, 64)
    monkeypatch.setattr(threads, "num_threads", lambda: 1)
    alone = layer(x)
    if threads.START:
        monkeypatch.setattr(threads, "num_threads", lambda: num_threads)
    assert torch.equal(layer(x), alone)


@torch.no_grad()
def test_without_gnu_openmp_one_thread_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "START", 0)
    layer, x = token_layer(*LARGE), torch.randn(1, 1, LARGE[1])
    assert threads.num_threads() == 1
    assert_close(layer(x), linear(x, layer.weight), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_a_folder_for_compiled_code_it_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_function = numba.cfunc

    def no_cache(signature: str, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_function(signature, **options)

    monkeypatch.setattr(numba, "cfunc", no_cache)
    products._address.cache_clear()
    layer, x = token_layer(*LARGE), torch.randn(1, 1, LARGE[1])
    assert_close(layer(x), linear(x, layer.weight), atol=1e-5, rtol=1e-5)
    products._address.cache_clear()


@pytest.mark.usefixtures("no_compiled_products")
@pytest.mark.parametrize(
    "x", [torch.ones(1, 9, 64), torch.ones(9, 1, 64), torch.ones(0, 1, 64)], ids=["9", "9x1", "0"]
)
def test_many_tokens_and_none_are_torchs(x: Tensor) -> None:
    layer = token_layer(64, 64)
    with torch.no_grad():
        assert torch.equal(layer(x), linear(x, layer.weight))


@pytest.mark.usefixtures("no_compiled_products")
def test_gradients_other_dtypes_and_devices_are_torchs() -> None:
    layer, x = token_layer(64, 64), torch.ones(1, 1, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.bfloat16())
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        meta = layer.float().to("meta")
        assert meta(torch.ones(1, 1, 64, device="meta")).is_meta


@pytest.mark.parametrize("faster", [True, False])
def test_a_model_is_changed_where_that_is_faster(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    measured: list[Tensor] = []
    monkeypatch.setattr(cpu_linear, "is_faster", lambda w: measured.append(w) or faster)
    llama.lm_head.weight = llama.model.embed_tokens.weight
    tokens = torch.tensor([[3], [4]])
    with torch.no_grad():
        before = llama(tokens).logits
        make_token_linear_(llama)
        assert_close(llama(tokens).logits, before, atol=1e-4, rtol=1e-4)
    layers = [m for m in llama.modules() if isinstance(m, nn.Linear)]
    assert {type(layer) for layer in layers} == {TokenLinear if faster else nn.Linear}
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert [w.shape for w in measured] == [llama.lm_head.weight.shape], "the largest layer"


@pytest.mark.parametrize("slow", ["ours", "torch's"])
def test_what_is_faster_is_measured(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    wait = lambda *_: time.sleep(0.02)  # noqa: E731
    if slow == "ours":
        monkeypatch.setattr(products, "multiply_in_threads", wait)
    else:
        monkeypatch.setattr(cpu_linear, "linear", wait)
    assert is_faster(torch.ones(8, 8)) == (slow != "ours")

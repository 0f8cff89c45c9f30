"""Linear layers in float32 on a CPU, fast for a few tokens too.

A base whose 4-bit values are expanded (`loading.expand_4bit_`) spends nearly all of a token reading
its weights. torch's product of a few tokens with a matrix reads them at a third of the speed of
memory on some CPUs: it takes several rows of weights at once, and memory is fast in its own order.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.benchmark import Timer
from transformers import PreTrainedModel

from spectr_demo.cpu import products

_MOST_TOKENS = 8


class TokenLinear(nn.Linear):
    """An `nn.Linear` in float32 on a CPU whose product with a few tokens is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        is_few = 0 < x.numel() <= _MOST_TOKENS * self.in_features
        is_plain = x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu
        if not (is_few and is_plain) or torch.is_grad_enabled():
            return super().forward(x)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        products.multiply_in_threads(y, x.contiguous(), weight)
        return y if self.bias is None else y.add_(self.bias)


def make_token_linear_(model: PreTrainedModel) -> None:
    """Turn the linear layers of a float32 model on a CPU into such ones, where they are faster.

    Whether they are is measured: on the largest layer, for one token.
    """
    linear_layers = (module for module in model.modules() if type(module) is nn.Linear)
    layers = [layer for layer in linear_layers if layer.weight.is_contiguous()]
    if is_faster(max(layers, key=lambda layer: layer.weight.numel()).weight):
        for layer in layers:
            layer.__class__ = TokenLinear  # the same weights, shared ones as before


@torch.no_grad()
def is_faster(weight: Tensor) -> bool:
    """Whether compiled code multiplies one token by this matrix in less time than torch."""
    token, product = torch.ones(1, weight.shape[1]), torch.empty(1, weight.shape[0])
    products = (
        lambda: products.multiply_in_threads(product, token, weight),
        lambda: linear(token, weight),
    )
    timers = [Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()) for f in products]
    ours, of_torch = (min(timer.timeit(1).median for _ in range(3)) for timer in timers)
    return ours < of_torch

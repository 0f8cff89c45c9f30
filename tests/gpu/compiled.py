"""Compile what the operators would launch on a GPU of compute capability 8.0, on a machine without
one: `python -m tests.gpu.compiled`. The interpreter runs code that the compiler refuses.
"""

import re
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from spectr_demo.gpu import launch
from tests.gpu.cases import CASES, Choices, inputs_of

NAMES = ["one expert", "five layers", "bfloat16", "1,000 experts, 20 kept"]


def main() -> None:
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 80, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    run = JITFunction.run

    def compile_alone(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, warmup=True, **options)
        vectors = set(re.findall(r"ld\.global\.(v\d)", kernel.asm["ptx"]))
        print(self.__name__, case.name, len(kernel.asm["cubin"]), "bytes", *vectors, sep=", ")

    JITFunction.run = compile_alone
    for case in (case for case in CASES if case.name in NAMES):
        rules, z, Bs, singular_values, kept = inputs_of(case, "cpu")
        R, P = len(case.rows), case.P
        choices = Choices.empty(case, (R, 3, P, rules.most), "cpu")
        ys = [torch.zeros(R, D, dtype=case.y_dtype) for D in case.D]
        step = torch.zeros(1, dtype=torch.int64)
        token = ys, z[:R].contiguous(), Bs, singular_values, rules.flat
        launch.add_chosen_(*token, kept, *choices, step)
        if kept is None:
            launch.weigh(z, singular_values, rules.flat, None, None, None)
        else:
            z = z.new_zeros(R, P, case.E, case.r)
            launch.weigh(z, singular_values, rules.flat, *(part[:, 0] for part in choices))
            A = torch.zeros(P * case.E * case.r, 96, dtype=case.dtype)
            launch.project_kept(A[:R], A, torch.zeros(R, P, case.E), 20)


if __name__ == "__main__":
    main()

"""Thousands of mutated adapters: each loads, or ends in an `AdapterError` of bounded length.

pytest tests/fuzz                        # 2,000, as in CI
FUZZ_CASES=100000 pytest tests/fuzz      # more
FUZZ_FIRST=1234 FUZZ_CASES=1 pytest tests/fuzz   # one of them again
"""

import copy
import os
import time
import traceback
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from spectr_demo.experts.adapters import AdapterError
from spectr_demo.experts.library import load_experts
from tests.conftest import SaveExpert
from tests.fuzz.mutations import mutate, parts_of, write

NUM_CASES = int(os.environ.get("FUZZ_CASES", 2000))
FIRST = int(os.environ.get("FUZZ_FIRST", 0))
# Of one adapter's: the patterns have four, and hidden in the rest is a file of sparse gigabytes.
MOST_CPU_SECONDS = 8
MOST_CHARACTERS = 10_000
MOST_FAILURES = 20


def fault_of(folder: Path, llama: LlamaForCausalLM) -> str:
    """What is wrong with how this adapter ends; empty where nothing is."""
    begin = time.process_time()
    try:
        library = load_experts(str(folder), llama)
    except AdapterError as error:
        text = str(error)
        if len(text) > MOST_CHARACTERS:
            return f"a message of {len(text)} characters"
        for problem in error.problems:
            if not problem.startswith("expert ") or not problem.isprintable():
                return f"the message is {problem!r}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error!s:.200} in {where.name}, {where.filename}"
    else:
        for bank in library.banks:
            if not all(t.isfinite().all() for t in (bank.A, *bank.B, bank.singular_values)):
                return "its factors are not finite"
    seconds = time.process_time() - begin
    return f"{seconds:.1f} s" if seconds > MOST_CPU_SECONDS else ""


@pytest.mark.slow
@pytest.mark.timeout(60 + NUM_CASES)
@pytest.mark.filterwarnings("ignore")
def test_mutated_adapters_load_or_say_why_not(
    save_expert: SaveExpert, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    sound = parts_of(Path(save_expert("sound", r=4, target_modules=["q_proj", "up_proj"])))
    failures = []
    for seed in range(FIRST, FIRST + NUM_CASES):
        write(mutate(copy.deepcopy(sound), seed), tmp_path / "case")
        if fault := fault_of(tmp_path / "case", llama):
            failures.append(f"seed {seed}: {fault}")
            if len(failures) == MOST_FAILURES:
                break
    assert not failures, "\n".join(failures)


def test_a_sound_adapter_loads(save_expert: SaveExpert, llama: LlamaForCausalLM) -> None:
    """... else the fuzzer would test nothing."""
    folder = Path(save_expert("sound", r=4, target_modules=["q_proj", "up_proj"]))
    assert load_experts(str(folder), llama).num_layers == 2
    assert fault_of(folder, llama) == ""

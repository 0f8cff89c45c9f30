"""The app under ZeroGPU's rules, as `tests/zero_gpu.py` emulates them; and what breaks them."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def emulated(what: str, **variables: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tests.zero_gpu", what],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_app_keeps_the_rules(
    base_folder: str,
    expert_folders: list[str],
) -> None:
    found = emulated(
        "app",
        SPECTR_BASE_MODEL=base_folder,
        # One of them is asked as the expert for a domain of the page's evaluation.
        SPECTR_EXPERTS=",".join([f"cron={expert_folders[0]}", *expert_folders[1:]]),
    )
    # Loaded and quantized for the GPU before the first call, without CUDA and without a forward.
    assert found["device"] == "cuda:0"
    assert found["quantization"] == "NF4, double quantization"
    assert not found["cuda_at_start"]
    assert found["forwards_at_start"] == 0
    assert found["banks"] == 2 * 4  # two layers: q k v, o, gate up, down
    # A function for runs, called once a run, for as long as the answer may take; and one that looks
    # inside.
    assert found["gpu_functions"] == 2
    assert found["are_generators"]
    assert found["seconds_of_the_endpoint"] == [12]
    assert found["seconds_of_reading"] == [10]
    assert found["seconds_of_the_page"] == [15]
    assert found["seconds_of_the_look"] == [15]
    assert found["parts_of_the_look"] > 20
    assert found["seconds_of_an_evaluated_prompt"] == [12]
    assert "✓ finished" in found["evaluation"]

    assert [column["label"] for column in found["answer"]] == [
        "base",
        "single:cron",
        "spectr-context",
    ]
    assert all(column["num_tokens"] for column in found["answer"])
    assert [request["text"] for request in found["requests"]] == ["hello"]
    assert "shorten one of them" in found["error"]
    assert "is-finished" in found["page"]
    assert "is-finished" in found["page_after_a_visitor_left"]


@pytest.mark.slow
def test_what_breaks_a_rule_is_caught() -> None:
    outcomes = emulated("rules")
    assert outcomes.pop("fine") == ""
    assert outcomes.pop("a tensor in the results") == "Error: 'PicklingError'"
    assert "would cross the border" in outcomes.pop("a tensor in the arguments")
    assert outcomes.pop("an async generator") == "Error: 'PicklingError'"
    assert outcomes.pop("CUDA outside of a GPU call")
    assert not outcomes


def test_spaces_is_imported_before_anything_that_may_use_cuda() -> None:
    tree = ast.parse((ROOT / "app.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    foreign = [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]
    assert foreign[0] == "spaces"

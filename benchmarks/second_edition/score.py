"""Turn what train.py wrote into PEFT folders, and score its answers with the tasks' own scorers.

    python benchmarks/second_edition/score.py DATA RESULTS

DATA is what build.py wrote, RESULTS what train.py wrote. Writes the adapters into assets/experts/,
and results.json beside this file, and prints the tables of README.md. It takes a minute on a CPU.
cards.py writes the model cards afterwards.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from benchmarks.second_edition.messages import TESTED_FORMATS
from benchmarks.second_edition.train import EXPERIMENT, SCALING, VARIANTS, seed_of
from spectr_demo.config import ASSETS
from spectr_demo.evaluation.messages import TRAINED_FORMATS
from spectr_demo.evaluation.scores import summarize
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS, Example

HERE = Path(__file__).resolve().parent
EXPERTS = ASSETS / "experts"
TARGET = 0.85  # of the single score, for the own part of a message with a foreign request
KINDS = ("singles", "pairs", "ordinary", "pairs, opening by base", "pairs, prompt by first")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One scored answer. place: 1 or 2. index: of the held-out example. score: in [0, 1].

    unmarked: the score where a list number before the answer does not count as wrong.
    """

    stage: str
    kind: str
    domain: str
    variant: str
    place: int
    format: str
    index: int
    score: float
    unmarked: float


def write_folders(results: Path, output: Path, kind: str = "experts") -> list[str]:
    """One PEFT folder for each adapter in `KIND_*.safetensors`; their names."""
    names: list[str] = []
    for file in sorted(results.glob(f"{kind}_*.safetensors")):
        adapters: dict[str, dict[str, Tensor]] = {}
        with safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (it is no dict)
                name, _, tensor = key.partition("/")
                adapters.setdefault(name, {})[tensor] = stored.get_tensor(key)
        for name, tensors in adapters.items():
            folder = output / name
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / "adapter_model.safetensors"
            save_file(tensors, target, metadata={"format": "pt"})
            target.chmod(0o644)
            config = json.dumps(adapter_config(tensors), indent=2)
            (folder / "adapter_config.json").write_text(f"{config}\n", encoding="utf-8")
        names += adapters
    return names


def adapter_config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """PEFT's config of a shipped expert, with the rank and the modules of these tensors."""
    config = json.loads((EXPERTS / "cron" / "adapter_config.json").read_text(encoding="utf-8"))
    (rank,) = {t.shape[0] for key, t in tensors.items() if key.endswith("lora_A.weight")}
    found = {key.split(".")[-3] for key in tensors}
    modules = [module for module in config["target_modules"] if module in found]
    return dict(config) | {
        "r": rank,
        "lora_alpha": round(SCALING * rank),
        "target_modules": modules,
    }


def scored(record: dict[str, Any], tests: dict[str, Any]) -> Iterator[Part]:
    heldout = {name: TASKS[name].build(SPLIT_SEED).heldout for name in TASKS}
    singles = [case for cases in tests["singles"].values() for case in cases]
    cases = {case["id"]: case for case in [*singles, *tests["pairs"], *tests["ordinary"]]}
    for stage in ("experiment", "final"):
        for kind in KINDS:
            for found in record.get(stage, {}).get(kind, []):
                for part in parts(found, cases[found["case"]], heldout):
                    yield Part(stage=stage, kind=kind, **part)


def parts(
    found: dict[str, Any], case: dict[str, Any], heldout: dict[str, tuple[Example, ...]]
) -> Iterator[dict[str, Any]]:
    """The parts of one message, without those that the base answers."""
    index = iter(case["heldout_index"])
    asked = zip(case["domains"], case["answers"], found["parts"], found["experts"], strict=True)
    for place, (domain, expected, text, expert) in enumerate(asked, 1):
        if domain == "base":
            continue
        i = next(index)
        example = heldout[domain][i]
        mark = expected.removesuffix(example.answer).strip()  # "1." where numbers were asked for
        own, unmarked = text.removeprefix(mark).strip(), re.sub(r"^\s*\d+[.)]\s+", "", text)
        yield {
            "domain": domain,
            "variant": expert.partition("@")[2],
            "place": place,
            "format": case["format"],
            "index": i,
            "score": TASKS[domain].score(own, example),
            "unmarked": TASKS[domain].score(unmarked, example),
        }


def mean_of(found: Iterable[Part]) -> dict[str, Any]:
    """Mean, interval and number; {} if nothing was measured."""
    scores = [part.score for part in found]
    return summarize(scores).to_dict() if scores else {}


def groups(found: list[Part]) -> dict[str, Any]:
    """All parts, then by place and by format."""
    ways: dict[str, Callable[[Part], bool]] = {
        "all": lambda _: True,
        "trained formats": lambda part: part.format in TRAINED_FORMATS,
        "first": lambda part: part.place == 1,
        "second": lambda part: part.place == 2,
    }
    out = {way: mean_of(filter(is_in, found)) for way, is_in in ways.items()}
    by_format = {f: mean_of(p for p in found if p.format == f) for f in TESTED_FORMATS}
    return {way: score for way, score in (out | by_format).items() if score}


def variant_scores(found: list[Part]) -> dict[str, Any]:
    """The experiment: each variant's three experts."""
    out: dict[str, Any] = {}
    for variant in VARIANTS:
        out[variant] = {}
        for domain in EXPERIMENT:
            own = [
                p
                for p in found
                if (p.stage, p.variant, p.domain) == ("experiment", variant, domain)
            ]
            out[variant][domain] = {
                "single": mean_of(p for p in own if p.kind == "singles"),
                "part": groups([p for p in own if p.kind == "pairs"]),
                "beside an ordinary line": groups([p for p in own if p.kind == "ordinary"]),
            }
    return out


def expert_scores(domain: str, found: list[Part], first: dict[str, Any]) -> dict[str, Any]:
    """One expert against the targets; first: the score of the first edition's expert."""
    by_kind = {
        kind: [p for p in found if (p.stage, p.domain, p.kind) == ("final", domain, kind)]
        for kind in KINDS
    }
    single = mean_of(by_kind["singles"])
    same = mean_of(p for p in by_kind["singles"] if p.index < first["num"])
    part = groups(by_kind["pairs"])
    of_single = {way: round(score["mean"] / single["mean"], 4) for way, score in part.items()}
    return {
        "metric": TASKS[domain].metric,
        "seed": seed_of(domain),
        "first edition": first,
        "single": single,
        "single, the first edition's examples": same,
        "is in the first edition's interval or above": same["mean"] >= first["low"],
        "part": part,
        "part of single": of_single,
        "part, list numbers dropped": groups(
            [replace(p, score=p.unmarked) for p in by_kind["pairs"]]
        ),
        "reaches the target": of_single["all"] >= TARGET,
        "part, template's opening by the base": groups(by_kind["pairs, opening by base"]),
        "part, prompt read by the first expert": groups(by_kind["pairs, prompt by first"]),
        "part beside an ordinary line": groups(by_kind["ordinary"]),
    }


def row(*cells: object) -> None:
    texts = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print(f"| {' | '.join(texts)} |")


def header(*names: str) -> None:
    print()
    row(*names)
    row(*["---"] * len(names))


def average(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def print_variants(variants: dict[str, Any]) -> None:
    header("variant", *EXPERIMENT, "mean", "first", "second", "ordinary line")
    for name, domains in variants.items():
        both = [
            f"{d['single']['mean']:.2f} / {d['part']['all']['mean']:.2f}" for d in domains.values()
        ]
        means = [
            average(d["part"][way]["mean"] for d in domains.values())
            for way in ("all", "first", "second")
        ]
        beside = average(d["beside an ordinary line"]["all"]["mean"] for d in domains.values())
        row(name, *both, *means, beside)


def print_experts(experts: dict[str, Any]) -> None:
    """The own part of a message as a share of the single score, but for the first four columns."""
    shares = ("all", "first", "second", "bulleted")
    header("expert", "first edition", "single", "own part", *shares, "prompt by first")
    for name, e in sorted(experts.items()):
        first, part = e["first edition"], e["part"]["all"]
        was, now = (f"{x['mean']:.2f} [{x['low']:.2f}, {x['high']:.2f}]" for x in (first, part))
        single = e["single, the first edition's examples"]["mean"]
        whole = e["part, prompt read by the first expert"]["all"]["mean"] / e["single"]["mean"]
        row(name, was, single, now, *[e["part of single"][way] for way in shares], whole)


def print_ways(experts: dict[str, Any]) -> None:
    """Part of single, mean of the ten experts, by who reads which tokens."""
    ways = ("all", "first", "second", *TESTED_FORMATS)
    header("prompt tokens", *ways)
    for title, key in (
        ("each part by its own expert", "part"),
        ("the same, a list number is not wrong", "part, list numbers dropped"),
        ("the same, the template's opening by the base", "part, template's opening by the base"),
        ("all by the first part's expert", "part, prompt read by the first expert"),
    ):
        shares = [
            average(e[key][way]["mean"] / e["single"]["mean"] for e in experts.values())
            for way in ways
        ]
        row(title, *shares)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    write_folders(options.results, EXPERTS)
    record = json.loads((options.results / "record.json").read_text(encoding="utf-8"))
    tests = json.loads((options.data / "tests.json").read_text(encoding="utf-8"))
    found = list(scored(record, tests))
    first = json.loads((HERE / "first_edition.json").read_text(encoding="utf-8"))
    final, winner = record["final"], record["final"]["winner"]
    # A run of the winner alone keeps what an experiment before it has found.
    known = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    has_experiment = "experiment" in record
    results = {
        "device": record["device"],
        "torch": record["torch"],
        "seconds": record["seconds"],
        "batch": sum(record["variants"][winner]["mix"]),
        "settings of the variants": record["variants"]
        if has_experiment
        else known["settings of the variants"],
        "variants": variant_scores(found) if has_experiment else known["variants"],
        "final": {
            **record["variants"][winner],
            "variant": winner,
            "steps": final["steps"],
            "seconds_per_step": round(final["seconds_per_step"], 3),
        },
        "experts": {
            name: expert_scores(name, found, first[name]["expert"]["all"])
            for name in final["names"]
        },
    }
    text = json.dumps(results, indent=1)
    (HERE / "results.json").write_text(f"{text}\n", encoding="utf-8")
    print_variants(results["variants"])
    print_experts(results["experts"])
    print_ways(results["experts"])


if __name__ == "__main__":
    main()

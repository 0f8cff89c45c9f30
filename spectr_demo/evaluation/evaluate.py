"""The evaluation: every router on held-out prompts of every expert's domain, and beyond them.

Everything is measured on the model as it is served. Results of parts are kept in the cache, so an
interrupted evaluation goes on where it was; a change of base, experts or routing code starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from spectr_demo.base.prompts import GENERIC_TEXT, encode, encode_answered, generic_prompts
from spectr_demo.config import RouterConfig, cache_dir, unknown_name
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.tracing import library_versions
from spectr_demo.evaluation import (
    tasks,
)
from spectr_demo.evaluation.accuracy import routing_accuracy
from spectr_demo.evaluation.compositional import LAYOUTS, Layout, compositional_scores, make_pairs
from spectr_demo.evaluation.generation import continue_texts
from spectr_demo.evaluation.merging import dare_merge, ties_merge
from spectr_demo.evaluation.reading import Reading, Text, read
from spectr_demo.evaluation.robustness.retrained import attach, read_retrained, retrained_test
from spectr_demo.evaluation.robustness.stress import stress
from spectr_demo.evaluation.scores import NUM_RESAMPLES, summarize
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS, Example
from spectr_demo.experts.adapters import Adapter
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.trace import NOT_ROUTED

RESAMPLING_SEED = 0
MERGE_SEEDS = (0, 1, 2)
EXAMPLES_AT_ONCE = 16  # a part of the results; more examples than before are new parts alone
CHAT_TOKENS = 40
# The whole package: its page and charts too, which decide no number.
_CODE = sorted(Path(__file__).resolve().parents[1].rglob("*.py"))


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the tables. router: a spec of `parse_router`, or a config; `{own}` in a spec is
    the expert of the prompt's own domain. is_merge: a static merge instead of the experts."""

    label: str
    router: str | RouterConfig
    is_merge: bool = False

    def config(self, own: str, names: Sequence[str]) -> RouterConfig:
        router = self.router
        return parse_router(router.format(own=own) if isinstance(router, str) else router, names)


_UNIFORM_PARAMETERS = RouterConfig(name="uniform", composition="parameters")
_CONTEXT = ROUTERS["spectr-context"].preset
_READ_ONCE = replace(_CONTEXT, reads_first=False, confidence=None)
CONTENDERS = (
    Contender(label="base", router="base"),
    Contender(label="oracle", router="single:{own}"),
    Contender(label="uniform (outputs)", router="uniform"),
    Contender(label="uniform (parameters)", router=_UNIFORM_PARAMETERS),
    Contender(label="TIES", router="single:ties", is_merge=True),
    *(
        Contender(label=f"DARE, seed {seed}", router=f"single:dare-{seed}", is_merge=True)
        for seed in MERGE_SEEDS
    ),
    Contender(label="arrow", router="arrow"),
    Contender(label="lag", router="lag"),
    Contender(label="norm", router="norm"),
    Contender(label="spectr-paper", router="spectr-paper"),
    Contender(label="spectr", router="spectr"),
    Contender(label="spectr-calibrated", router="spectr-calibrated"),
    # What each idea gives alone: SpectR's score, K = 1, no expert kept back.
    Contender(label="pooled", router=RouterConfig(name="spectr", decay=_CONTEXT.decay)),
    Contender(
        label="calibrated, pooled",
        router=RouterConfig(name="spectr", calibrated=True, decay=_CONTEXT.decay),
    ),
    # ... and what is lost without one of them.
    Contender(label="context, prompt not read first", router=_READ_ONCE),
    Contender(label="context, always an expert", router=replace(_CONTEXT, confidence=None)),
    Contender(label="spectr-context", router="spectr-context"),
)
QUICK = ("base", "oracle", "arrow", "spectr", "spectr-context")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured. num_examples: per domain, half of them with held-out wordings.
    num_pairs: of compositional prompts. num_offdomain: of ordinary chat. stress_texts: per domain.
    0 of these three leaves their tests out. retrained: NAME=FOLDER of experts trained again, see
    `retrained`. labels: contenders."""

    num_examples: int = 16
    num_pairs: int = 12
    num_offdomain: int = 16
    labels: tuple[str, ...] = tuple(contender.label for contender in CONTENDERS)
    stress_texts: int = 2
    retrained: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_examples < 2:
            raise ValueError(
                f"num_examples is {self.num_examples}; at least 2 a domain were needed, one in a "
                "trained wording and one in a held-out one"
            )

    @classmethod
    def quick(cls) -> Settings:
        """What two cores do in about five minutes."""
        return cls(num_examples=3, num_pairs=2, num_offdomain=4, labels=QUICK, stress_texts=0)


class Evaluation:
    """One evaluation of one engine. Experts whose name is no task's are routed to, not asked."""

    def __init__(self, engine: SpectrModel, settings: Settings) -> None:
        known = [contender.label for contender in CONTENDERS]
        for label in settings.labels:
            if label not in known:
                raise unknown_name("row", label, known)
        self.engine = engine
        self.settings = settings
        self.names = [name for name in engine.library.names if name in TASKS]
        if len(self.names) < 2:
            raise ValueError(
                f"evaluate: the experts are {', '.join(engine.library.names) or 'none'}; at least "
                f"two named after tasks ({', '.join(TASKS)}) were needed; rename one as NAME=SOURCE"
            )
        for name in self.names:
            TASKS[name].check_packages()
        self.retrained = [read_retrained(source, self.names) for source in settings.retrained]
        held = {name: TASKS[name].build(SPLIT_SEED).heldout for name in self.names}
        self.examples = {name: list(held[name][: settings.num_examples]) for name in self.names}
        self.pairs = make_pairs(held, settings.num_pairs)
        chosen = [c for c in CONTENDERS if c.label in settings.labels]
        self.contenders = [c for c in chosen if not c.is_merge]
        self.merges = [c for c in chosen if c.is_merge]
        generic = json.loads(GENERIC_TEXT.read_text(encoding="utf-8"))
        self.offdomain: list[str] = generic["offdomain"][: settings.num_offdomain]
        self.folder = cache_dir() / "evaluation" / self._fingerprint()

    def run(self) -> dict[str, Any]:
        """Measure everything; the content of the results' JSON file.

        The engine's experts are taken off for the static merges: it is not to be used afterwards.
        """
        meta = self._meta()
        answers: dict[str, dict[str, list[float]]] = {}
        readings: dict[str, dict[str, Any]] = {}
        offdomain: dict[str, Any] = {}
        compositional: dict[str, Any] = {}
        of_domains = 2 * len(self.names) * len(self._spans)
        layouts = LAYOUTS if self.settings.num_pairs else ()
        num_beyond = (self.settings.num_offdomain > 0) + len(layouts)
        parts = len(self.contenders) * (of_domains + num_beyond)
        parts += len(self.merges) * of_domains
        parts += (self.settings.stress_texts > 0) + len(self.retrained)
        with tqdm(total=parts, unit="part") as bar:
            self._bar = bar
            for contender in self.contenders:
                answers[contender.label], readings[contender.label] = self._domains(contender)
                if contender.label == "oracle":
                    bar.update(num_beyond)  # no single expert is right for these
                    continue
                config = contender.config("", self.engine.library.names)
                if self.settings.num_offdomain:
                    offdomain[contender.label] = self._part(
                        "off-domain", config, self._offdomain, self.settings.num_offdomain
                    )
                compositional[contender.label] = {
                    layout: self._part(
                        f"compositional, {layout}",
                        config,
                        partial(self._pairs, layout=layout),
                        self.settings.num_pairs,
                    )
                    for layout in layouts
                }
            stressed = self._stress() if self.settings.stress_texts else None
            retrained = [self._retrained(name, adapter) for name, adapter in self.retrained]
            if self.merges:
                self.engine = self._merged()
            for contender in self.merges:
                answers[contender.label], readings[contender.label] = self._domains(contender)
        return {
            "meta": meta,
            "scores": summarise(answers),
            "likelihood": _likelihood(readings),
            "accuracy": {
                label: {name: row[name]["accuracy"] for name in row}
                for label, row in readings.items()
                if all("accuracy" in part for part in row.values())
            },
            "offdomain": offdomain,
            "compositional": compositional,
            "stress": stressed,
            "retrained": retrained,
        }

    def _domains(self, contender: Contender) -> tuple[dict[str, list[float]], dict[str, Any]]:
        """Scores of the generated answers, and readings of the reference ones, by domain."""
        answers: dict[str, list[float]] = {}
        readings: dict[str, dict[str, Any]] = {}
        for name in self.names:
            config = contender.config(name, self.engine.library.names)
            answers[name], parts = [], []
            for start, stop in self._spans:
                examples = self.examples[name][start:stop]
                answer = partial(self._answers, name=name, examples=examples)
                answers[name] += self._part("answers", config, answer, name, start, stop)
                reading = partial(self._reading, name=name, examples=examples)
                parts.append(self._part("reading", config, reading, name, start, stop))
            readings[name] = _joined(parts)
        return answers, readings

    @property
    def _spans(self) -> list[tuple[int, int]]:
        """The examples of a domain, in parts."""
        num = self.settings.num_examples
        starts = range(0, num, EXAMPLES_AT_ONCE)
        return [(start, min(start + EXAMPLES_AT_ONCE, num)) for start in starts]

    def _answers(self, config: RouterConfig, name: str, examples: Sequence[Example]) -> list[float]:
        task = TASKS[name]
        answers = continue_texts(
            self.engine.model,
            self.engine.tokenizer,
            [self.engine.encode(example.prompt) for example in examples],
            max_new_tokens=task.max_new_tokens,
            around=lambda rows: routed(self.engine.plan([config] * len(rows), rows)),
            description=f"{config.name}: {name}",
        )
        return [task.score(a, e) for a, e in zip(answers, examples, strict=True)]

    def _reading(
        self, config: RouterConfig, name: str, examples: Sequence[Example]
    ) -> dict[str, Any]:
        texts = [make_text(self.engine, e.prompt, e.answer) for e in examples]
        rows = read(self.engine, config, texts, description=f"{config.name}: {name}")
        result: dict[str, Any] = {"nll": [row.nll for row in rows]}
        if ROUTERS[config.name].score is not None:
            expert = self.engine.library.index(name)
            groups = {
                "all": rows,
                "seen wording": _where(rows, examples, is_heldout=False),
                "held-out wording": _where(rows, examples, is_heldout=True),
            }
            result["accuracy"] = {
                group: {"num": len(of_group), **routing_accuracy(of_group, expert)}
                for group, of_group in groups.items()
                if of_group
            }
        return result

    def _offdomain(self, config: RouterConfig) -> dict[str, float]:
        """How far the base's own answers to ordinary chat are moved: KL in nats a token, share of
        tokens whose likeliest choice stays, and the rise of the answers' NLL."""
        texts = [make_text(self.engine, prompt, answer) for prompt, answer in self._chat()]
        rows = read(self.engine, config, texts, with_base=True, description=config.name)
        unrouted = [(row.choices == NOT_ROUTED).mean() for row in rows if row.choices is not None]
        return {
            "kl": float(np.mean([row.kl.mean() for row in rows])),
            "agreement": float(np.mean([row.agrees.mean() for row in rows])),
            "nll_rise": float(np.mean([row.nll + row.base_logprob.mean() for row in rows])),
            **({"unrouted": float(np.mean(unrouted))} if unrouted else {}),
        }

    def _chat(self) -> list[tuple[str, str]]:
        """Ordinary prompts and the base's greedy answers."""

        def answers(config: RouterConfig) -> list[str]:
            return continue_texts(
                self.engine.model,
                self.engine.tokenizer,
                [self.engine.encode(prompt) for prompt in self.offdomain],
                max_new_tokens=CHAT_TOKENS,
                around=lambda rows: routed(None),
                description="chat",
            )

        base = RouterConfig(name="base")
        texts = self._part("chat", base, answers, self.settings.num_offdomain)
        return list(zip(self.offdomain, texts, strict=True))

    def _pairs(self, config: RouterConfig, layout: Layout) -> dict[str, Any]:
        return compositional_scores(self.engine, config, self.pairs, layout)

    def _stress(self) -> dict[str, Any]:
        num = self.settings.stress_texts
        texts = {
            name: [make_text(self.engine, e.prompt, e.answer) for e in self.examples[name][:num]]
            for name in self.names
        }
        return self._part(
            "stress",
            RouterConfig(name="base"),
            lambda config: stress(self.engine, texts, generic_prompts()),
            num,
        )

    def _retrained(self, name: str, adapter: Adapter) -> dict[str, Any]:
        examples = self.examples[name]
        texts = [make_text(self.engine, e.prompt, e.answer) for e in examples]

        def compute(config: RouterConfig) -> dict[str, Any]:
            result, self.engine = retrained_test(self.engine, name, adapter, texts)
            return result

        return self._part(
            "retrained", RouterConfig(name="base"), compute, adapter.sha256, len(examples)
        )

    def _merged(self) -> SpectrModel:
        """The same base with the static merges as its experts."""
        adapters = self.engine.library.adapters
        merged = [ties_merge(adapters), *(dare_merge(adapters, seed) for seed in MERGE_SEEDS)]
        return attach(self.engine, merged)

    def _part(
        self,
        kind: str,
        config: RouterConfig,
        compute: Callable[[RouterConfig], Any],
        *of: str | int,
    ) -> Any:
        """What `compute(config)` gives, from the cache where this very part was measured before.

        of: what else the part depends on.
        """
        key = json.dumps([kind, *of, config.to_json()], sort_keys=True)
        file = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            result = compute(config)
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(result), encoding="utf-8")
            unfinished.replace(file)  # atomic: two processes may share the work
        if kind != "chat":
            self._bar.update()
        return result

    def _fingerprint(self) -> str:
        """Of everything that the results depend on but the settings."""
        base = self.engine.base
        parts = [base.fingerprint, base.quantization, str(base.compute_dtype)]
        parts += [f"{a.name} {a.sha256}" for a in self.engine.library.adapters]
        files = [*_CODE, GENERIC_TEXT]
        files += sorted(Path(str(tasks.__file__)).parent.glob("*.py"))
        parts += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _meta(self) -> dict[str, Any]:
        base = self.engine.base
        device = base.device
        return {
            "commit": _commit(),
            "date": datetime.now(UTC).date().isoformat(),
            "seed": SPLIT_SEED,
            "base": base.source,
            "base_fingerprint": base.fingerprint,
            "quantization": base.quantization,
            "compute_dtype": str(base.compute_dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
            "versions": library_versions(),
            "projections": list(self.engine.library.projections),
            "experts": {a.name: a.sha256 for a in self.engine.library.adapters},
            "settings": asdict(self.settings),
            "routers": {
                c.label: c.router if isinstance(c.router, str) else c.router.to_json()
                for c in (*self.contenders, *self.merges)
            },
        }


def make_text(engine: SpectrModel, prompt: str, answer: str) -> Text:
    """A prompt in the base's template and the answer to it, its end token included."""
    prompt_ids = encode(engine.tokenizer, prompt)
    whole = encode_answered(engine.tokenizer, prompt, answer)
    return Text(prompt_ids=tuple(prompt_ids), answer_ids=tuple(whole[len(prompt_ids) :]))


def summarise(answers: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """By label and domain: mean and 95% interval. `macro` is the mean over the domains, and
    `of_oracle` the mean over the domains of the score divided by the oracle's; domains in which
    the oracle never scores are left out of it. Intervals of both are percentile bootstraps in which
    all labels share the resampled prompts.
    """
    names = list(next(iter(answers.values())))
    rng = np.random.default_rng(RESAMPLING_SEED)
    draws = {
        name: rng.integers(0, num, size=(NUM_RESAMPLES, num))
        for name, num in ((name, len(next(iter(answers.values()))[name])) for name in names)
    }
    means = {
        label: np.array([np.mean(row[name]) for name in names]) for label, row in answers.items()
    }
    resampled = {
        label: np.stack([np.asarray(row[name])[draws[name]].mean(1) for name in names])
        for label, row in answers.items()
    }  # (domains, resamples)
    result: dict[str, Any] = {}
    for label, row in answers.items():
        result[label] = {
            "domains": {name: summarize(row[name]).to_dict() for name in names},
            "macro": _interval(means[label].mean(), resampled[label].mean(0)),
        }
        scores = means["oracle"] > 0 if "oracle" in answers else np.zeros(len(names), np.bool_)
        if scores.any():
            oracle = resampled["oracle"]
            ratios = np.divide(
                resampled[label], oracle, out=np.full_like(oracle, np.nan), where=oracle > 0
            )
            result[label]["of_oracle"] = _interval(
                (means[label][scores] / means["oracle"][scores]).mean(),
                np.nanmean(ratios[scores], axis=0),
            )
    return result


def _interval(mean: float, resampled: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {
        "mean": round(float(mean), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def _likelihood(readings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By label: mean NLL of an answer token in nats by domain and over them, and `way`, the share
    of the way from the base's to the oracle's."""
    nll = {
        label: {name: float(np.mean(part["nll"])) for name, part in row.items()}
        for label, row in readings.items()
    }
    macro = {label: float(np.mean(list(row.values()))) for label, row in nll.items()}
    result: dict[str, Any] = {}
    for label, row in nll.items():
        result[label] = {"domains": row, "macro": macro[label]}
        if {"base", "oracle"} <= macro.keys():
            way = (macro["base"] - macro[label]) / (macro["base"] - macro["oracle"])
            result[label]["way"] = round(way, 4)
    return result


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One reading from those of its parts; a mean counts as much as it has texts."""
    result: dict[str, Any] = {"nll": [nll for part in parts for nll in part["nll"]]}
    groups = [part["accuracy"] for part in parts if "accuracy" in part]
    if groups:
        result["accuracy"] = {
            name: _mean([group[name] for group in groups if name in group])
            for name in dict.fromkeys(name for group in groups for name in group)
        }
    return result


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of equal keys, weighted by the rows' `num`, and their sum."""
    nums = [row["num"] for row in rows]
    means = {
        key: np.average([row[key] for row in rows], axis=0, weights=nums).tolist()
        for key in rows[0]
        if key != "num"
    }
    return {"num": sum(nums), **means}


def _where(
    rows: Sequence[Reading], examples: Sequence[Example], *, is_heldout: bool
) -> list[Reading]:
    pairs = zip(rows, examples, strict=True)
    return [row for row, example in pairs if example.is_heldout_wording == is_heldout]


def _commit() -> str | None:
    """The commit that is measured, `-dirty` where files differ from it; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()

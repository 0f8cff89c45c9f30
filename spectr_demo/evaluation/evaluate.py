"""The evaluation: every router on held-out prompts of every expert's domain, and beyond them.

Everything is measured on the model as it is served. The rows of the tables are in `contenders.py`,
the cache of what is measured in `parts.py`, and what is made of it in `results.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

from tqdm import tqdm

from spectr_demo.base.generic import generic_prompts
from spectr_demo.config import DEFAULT_ROUTER, RouterConfig, unknown_name
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.accuracy import routing_accuracy
from spectr_demo.evaluation.claims import (
    chat_claims,
    message_claims,
    reading_claims,
    request_claims,
    score_claims,
)
from spectr_demo.evaluation.composition import (
    SEGMENTS,
    SINGLE,
    Message,
    Routing,
    Scores,
    make_messages,
    routed_parts,
    score_parts,
    segment_parts,
    segment_routing,
    single_parts,
)
from spectr_demo.evaluation.composition_figures import composition_figures
from spectr_demo.evaluation.contenders import COMPOSED, CONTENDERS, MERGE_SEEDS, QUICK, Contender
from spectr_demo.evaluation.generation import continue_texts, routed_answers
from spectr_demo.evaluation.merging import dare_merge, ties_merge
from spectr_demo.evaluation.ordinary import (
    Asked,
    ByConfidence,
    chosen_experts,
    ordinary_figures,
)
from spectr_demo.evaluation.parts import ORDINARY, Parts
from spectr_demo.evaluation.reading import Reading, Text, read
from spectr_demo.evaluation.requests import Measured, by_metric, metrics_of, whom_figures
from spectr_demo.evaluation.results import (
    accuracies,
    chat_shifts,
    conditions,
    decisions,
    join_readings,
    likelihoods,
    task_scores,
)
from spectr_demo.evaluation.robustness.retrained import attach, read_retrained, retrained_test
from spectr_demo.evaluation.robustness.stress import stress
from spectr_demo.evaluation.tasks import SPLIT_SEED, TASKS, Example
from spectr_demo.experts.adapters import Adapter
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.trace import NOT_ROUTED

EXAMPLES_AT_ONCE = 16  # a part of the results; more examples than before are new parts alone
CHAT_TOKENS = 40


Answer = Callable[[SpectrModel, Sequence[Message], int], list[list[str]]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured.

    num_examples: prompts of each domain; half of them are in held-out wordings. num_pairs,
    num_triples: messages with two and with three requests, see `make_messages`. num_offdomain:
    prompts of ordinary chat. num_ordinary, num_requests: ordinary prompts of each length and single
    requests of each domain, see `ordinary.py`. stress_texts: of each domain, see `stress`. A 0
    leaves a test out, and two of them that of messages. labels: of the `CONTENDERS` that are
    compared. retrained: experts that were trained again, as NAME=FOLDER, see `retrained`.
    """

    num_examples: int = 16
    num_pairs: int = 90
    num_triples: int = 60
    num_offdomain: int = 16
    num_ordinary: int = 150
    num_requests: int = 100
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
        return cls(
            num_examples=3,
            num_pairs=5,
            num_triples=0,
            num_offdomain=4,
            num_ordinary=0,
            labels=QUICK,
            stress_texts=0,
        )


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
        self.messages = make_messages(held, settings.num_pairs, settings.num_triples)
        chosen = [c for c in CONTENDERS if c.label in settings.labels]
        self.contenders = [c for c in chosen if not c.is_merge]
        self.merges = [c for c in chosen if c.is_merge]
        ordinary = json.loads(ORDINARY.read_text(encoding="utf-8"))
        self.offdomain: list[str] = ordinary["chat"][: settings.num_offdomain]
        self.ordinary: dict[str, list[dict[str, str]]] = {
            length: entries[: settings.num_ordinary] for length, entries in ordinary["test"].items()
        }
        self.requests = {name: list(held[name][: settings.num_requests]) for name in self.names}
        self.reads_requests = bool(
            settings.num_ordinary and settings.num_requests and DEFAULT_ROUTER in settings.labels
        )
        self.parts = Parts(engine)
        self._bar = tqdm(disable=True)
        self.rows_at_once = 256 if engine.base.device.type == "cuda" else 32

    def run(self) -> dict[str, Any]:
        """Measure everything; the content of the results' JSON file.

        The engine's experts are taken off for the static merges: it is not to be used afterwards.
        """
        meta = conditions(self.engine, asdict(self.settings), [*self.contenders, *self.merges])
        with tqdm(total=self._num_parts, unit="part") as self._bar:
            domains = {c.label: self._domains(c) for c in self.contenders}
            chat = {c.label: self._chat_shift(c) for c in self._beyond}
            composed, bounds = self._composed_rows(self.contenders), self._bounds()
            requests, named = self._requests() if self.reads_requests else ({}, {})
            stressed = self._stress() if self.settings.stress_texts else None
            retrained = [self._retrained(name, adapter) for name, adapter in self.retrained]
            if self.merges:
                self.merge()
            domains |= {c.label: self._domains(c) for c in self.merges}
            composed |= self._composed_rows(self.merges)
        readings = {label: row for label, (_, row) in domains.items()}
        answers = {label: row for label, (row, _) in domains.items()}
        return {
            "meta": meta,
            "scores": task_scores(answers),
            "likelihood": likelihoods(readings),
            "accuracy": accuracies(readings),
            "decisions": decisions(readings),
            "offdomain": chat_shifts(chat),
            **requests,
            "composition": self._composition(composed, bounds),
            "stress": stressed,
            "retrained": retrained,
            "claims": [
                *score_claims(answers),
                *reading_claims(readings),
                *chat_claims(chat),
                *(request_claims(named) if named else []),
            ],
        }

    def with_composition(self, results: dict[str, Any] | None) -> dict[str, Any]:
        """Measure the messages with several requests alone, and put them into other results.

        results: what `run` returned, or None. As after `run`, the engine is not to be used
        afterwards.
        """
        if not self.messages:
            raise ValueError(
                f"num_pairs is {self.settings.num_pairs} and num_triples "
                f"{self.settings.num_triples}, which leave no message for the experts "
                f"{', '.join(self.names)}; one was needed; ask for some"
            )
        contenders, merges = (
            [c for c in some if c.label in COMPOSED] for some in (self.contenders, self.merges)
        )
        meta = conditions(self.engine, asdict(self.settings), [*contenders, *merges])
        with tqdm(total=self._num_composed_parts, unit="part") as self._bar:
            composed, bounds = self._composed_rows(contenders), self._bounds()
            if merges:
                self.merge()
            composed |= self._composed_rows(merges)
        composition = {"meta": meta, **(self._composition(composed, bounds) or {})}
        return {**(results or {"meta": meta}), "composition": composition}

    def calls(self, *, only_composition: bool = False) -> list[list[Callable[[], Any]]]:
        """What `run`, else `with_composition`, measures, in calls that other processes may share.

        The first ones are of the experts. The others are of the static merges: a process that has
        made one of those has no experts any more.
        """
        of_experts: list[Callable[[], Any]] = [self._bounds]
        if not only_composition:
            if self.reads_requests:
                of_experts.append(self._requests)
            if self.settings.stress_texts:
                of_experts.append(self._stress)
            of_experts += [partial(self._retrained, *again) for again in self.retrained]
            of_experts += [partial(self._chat_shift, c) for c in self._beyond]
        of_merges: list[Callable[[], Any]] = []
        for calls, contenders in (of_experts, self.contenders), (of_merges, self.merges):
            composed = [c for c in contenders if self.messages and c.label in COMPOSED]
            calls += [partial(self._composed, c) for c in composed]
            if not only_composition:
                each = [(c, name) for c in contenders for name in self.names]
                calls += [partial(self._domain, c, name) for c, name in each]
        return [of_experts, of_merges]

    def merge(self) -> None:
        """Put the static merges in the experts' place, for good."""
        self.engine = self._merged()

    @property
    def _beyond(self) -> list[Contender]:
        """Those that answer ordinary chat. No single expert is right there."""
        chat = self.settings.num_offdomain > 0
        return [c for c in self.contenders if chat and c.label != "oracle"]

    @property
    def _num_parts(self) -> int:
        settings = self.settings
        num_domains = (len(self.contenders) + len(self.merges)) * len(self.names)
        chat = len(self._beyond)
        others = (settings.stress_texts > 0) + len(self.retrained)
        others += self.reads_requests * (len(self.ordinary) + 2 * len(self.names))
        return 2 * num_domains * len(self._spans) + chat + self._num_composed_parts + others

    def _part(
        self,
        kind: str,
        config: RouterConfig,
        compute: Callable[[RouterConfig], Any],
        *of: str | int,
    ) -> Any:
        """A part of the results, counted on the progress bar; arguments as `Parts.get` has them."""
        result = self.parts.get(kind, config, compute, *of)
        self._bar.update()
        return result

    def _domains(self, contender: Contender) -> tuple[dict[str, list[float]], dict[str, Any]]:
        """Scores of the generated answers, and readings of the reference ones, by domain."""
        found = {name: self._domain(contender, name) for name in self.names}
        return (
            {name: answers for name, (answers, _) in found.items()},
            {name: reading for name, (_, reading) in found.items()},
        )

    def _domain(self, contender: Contender, name: str) -> tuple[list[float], dict[str, Any]]:
        config = contender.config(name, self.engine.library.names)
        answers: list[float] = []
        parts = []
        for start, stop in self._spans:
            examples = self.examples[name][start:stop]
            answer = partial(self._answers, name=name, examples=examples)
            answers += self._part("answers", config, answer, name, start, stop)
            reading = partial(self._reading, name=name, examples=examples)
            parts.append(self._part("reading", config, reading, name, start, stop))
        return answers, join_readings(parts)

    @property
    def _spans(self) -> list[tuple[int, int]]:
        """The examples of a domain, in parts."""
        num = self.settings.num_examples
        starts = range(0, num, EXAMPLES_AT_ONCE)
        return [(start, min(start + EXAMPLES_AT_ONCE, num)) for start in starts]

    def _answers(self, config: RouterConfig, name: str, examples: Sequence[Example]) -> list[float]:
        task = TASKS[name]
        answers = routed_answers(
            self.engine,
            config,
            [self.engine.encode(example.prompt) for example in examples],
            max_new_tokens=task.max_new_tokens,
            description=f"{config.name}: {name}",
        )
        return [task.score(a, e) for a, e in zip(answers, examples, strict=True)]

    def _reading(
        self, config: RouterConfig, name: str, examples: Sequence[Example]
    ) -> dict[str, Any]:
        texts = self._texts(examples)
        rows = read(self.engine, config, texts, description=f"{config.name}: {name}")
        result: dict[str, Any] = {"nll": [row.nll for row in rows]}
        if ROUTERS[config.name].chooses:
            expert = self.engine.library.index(name)
            result["right"] = [routing_accuracy([row], expert)["answer"] for row in rows]
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

    def _texts(self, examples: Sequence[Example]) -> list[Text]:
        return [Text.from_chat(self.engine, e.prompt, e.answer) for e in examples]

    def _chat_shift(self, contender: Contender) -> dict[str, list[float]]:
        config = contender.config("", self.engine.library.names)
        return self._part("off-domain", config, self._offdomain, self.settings.num_offdomain)

    def _offdomain(self, config: RouterConfig) -> dict[str, list[float]]:
        """How far the base's own answer to each prompt of ordinary chat is moved: KL in nats a
        token, share of tokens whose likeliest choice stays, and the rise of the answer's NLL."""
        texts = [Text.from_chat(self.engine, prompt, answer) for prompt, answer in self._chat()]
        rows = read(self.engine, config, texts, with_base=True, description=config.name)
        unrouted = [
            float((row.choices == NOT_ROUTED).mean()) for row in rows if row.choices is not None
        ]
        return {
            "kl": [float(row.kl.mean()) for row in rows],
            "agreement": [float(row.agrees.mean()) for row in rows],
            "nll_rise": [float(row.nll + row.base_logprob.mean()) for row in rows],
            **({"unrouted": unrouted} if unrouted else {}),
        }

    def _chat(self) -> list[tuple[str, str]]:
        """Ordinary prompts and the base's greedy answers."""

        def answers(config: RouterConfig) -> list[str]:
            return continue_texts(
                self.engine.model,
                self.engine.tokenizer,
                [self.engine.encode(prompt) for prompt in self.offdomain],
                max_new_tokens=CHAT_TOKENS,
                around=lambda numbers: routed(None),
                description="chat",
            )

        base = RouterConfig(name="base")
        texts = self.parts.get("chat", base, answers, self.settings.num_offdomain)
        return list(zip(self.offdomain, texts, strict=True))

    @property
    def _num_composed_parts(self) -> int:
        """Two of each row, by what it answers and whom it chooses; and one of each bound."""
        num = sum(c.label in COMPOSED for c in [*self.contenders, *self.merges])
        return 2 * (num + 1) if self.messages else 0

    def _message_part(
        self, kind: str, config: RouterConfig, compute: Callable[[RouterConfig], Any]
    ) -> Any:
        return self._part(kind, config, compute, self.settings.num_pairs, self.settings.num_triples)

    def _composed_rows(
        self, contenders: Sequence[Contender]
    ) -> dict[str, tuple[Scores, Routing | None]]:
        """Of those that answer messages, by label."""
        composed = [c for c in contenders if self.messages and c.label in COMPOSED]
        return {contender.label: self._composed(contender) for contender in composed}

    def _composed(self, contender: Contender) -> tuple[Scores, Routing | None]:
        """Scores of a row's answers to the messages, and whom it chose for their parts."""
        config = contender.config("", self.engine.library.names)
        return (
            self._message_part("messages", config, self._message_scores),
            self._message_part("messages, routing", config, self._message_routing),
        )

    def _message_scores(self, config: RouterConfig) -> Scores:
        answers = routed_parts(self.engine, config, self.messages, self.rows_at_once)
        return score_parts(self.messages, answers)

    def _message_routing(self, config: RouterConfig) -> Routing | None:
        return segment_routing(self.engine, config, self.messages, self.rows_at_once // 2)

    def _bounds(self) -> dict[str, Scores]:
        """Scores of what a router can reach at best: see `composition.py`."""
        if not self.messages:
            return {}
        base = RouterConfig(name="base")
        answers = {SEGMENTS: segment_parts, SINGLE: single_parts}
        return {
            label: self._message_part(label, base, partial(self._bound_scores, answer=answer))
            for label, answer in answers.items()
        }

    def _bound_scores(self, config: RouterConfig, answer: Answer) -> Scores:
        return score_parts(self.messages, answer(self.engine, self.messages, self.rows_at_once))

    def _composition(
        self, composed: dict[str, tuple[Scores, Routing | None]], bounds: dict[str, Scores]
    ) -> dict[str, Any] | None:
        if not self.messages:
            return None
        scores = {label: scores for label, (scores, _) in composed.items()} | bounds
        routing = {label: routing for label, (_, routing) in composed.items()}
        return {
            **composition_figures(self.messages, scores, routing),
            "claims": message_claims(self.messages, scores),
        }

    def _requests(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ordinary prompts and single requests: whom the default router takes them for; and
        `by_metric` of each domain."""
        config = parse_router(DEFAULT_ROUTER, self.engine.library.names)
        assert config.confidence is not None
        ordinary = {
            length: self._chosen(config, [entry["prompt"] for entry in entries], length)
            for length, entries in self.ordinary.items()
        }
        asked, named = {}, {}
        for name, examples in self.requests.items():
            prompts = [example.prompt for example in examples]
            asked[name] = Asked(
                chosen=self._chosen(config, prompts, name),
                is_heldout=[example.is_heldout_wording for example in examples],
            )
            compute = partial(self._by_metric, prompts=prompts, name=name)
            named[name] = self._part("metrics", config, compute, name, len(prompts))
        figures = {
            "ordinary": ordinary_figures(self.ordinary, ordinary, asked, config.confidence),
            "whom": whom_figures(named, {name: of.is_heldout for name, of in asked.items()}),
        }
        return figures, named

    def _by_metric(self, config: RouterConfig, prompts: Sequence[str], name: str) -> Any:
        expert = self.engine.library.index(name)
        return by_metric(self.engine, prompts, expert, self._metrics)

    @cached_property
    def _metrics(self) -> dict[str, Measured]:
        return metrics_of(self.engine)

    def _chosen(self, config: RouterConfig, prompts: Sequence[str], of: str) -> ByConfidence:
        def compute(config: RouterConfig) -> ByConfidence:
            return chosen_experts(self.engine, config, prompts, of)

        chosen: ByConfidence = self._part("lanes", config, compute, of, len(prompts))
        return chosen

    def _stress(self) -> dict[str, Any]:
        num = self.settings.stress_texts
        texts = {name: self._texts(self.examples[name][:num]) for name in self.names}
        return self._part(
            "stress",
            RouterConfig(name="base"),
            lambda config: stress(self.engine, texts, generic_prompts(self.engine.base)),
            num,
        )

    def _retrained(self, name: str, adapter: Adapter) -> dict[str, Any]:
        texts = self._texts(self.examples[name])

        def compute(config: RouterConfig) -> dict[str, Any]:
            result, self.engine = retrained_test(self.engine, name, adapter, texts)
            return result

        return self._part(
            "retrained", RouterConfig(name="base"), compute, adapter.sha256, len(texts)
        )

    def _merged(self) -> SpectrModel:
        """The same base with the static merges as its experts."""
        adapters = self.engine.library.adapters
        merged = [ties_merge(adapters), *(dare_merge(adapters, seed) for seed in MERGE_SEEDS)]
        return attach(self.engine, merged)


def _where(
    rows: Sequence[Reading], examples: Sequence[Example], *, is_heldout: bool
) -> list[Reading]:
    pairs = zip(rows, examples, strict=True)
    return [row for row, example in pairs if example.is_heldout_wording == is_heldout]

"""A run with several lanes in a column: each is answered as if it were alone, and one trace tells
of all."""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from spectr_demo.base.prompts import Part
from spectr_demo.config import GenerationSettings, RouterConfig
from spectr_demo.engine import reading
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.reading import Lane, Reader, ReadPrompt
from spectr_demo.engine.run import Step
from spectr_demo.engine.tracing import Row, _with_line_ends
from spectr_demo.routing.lanes import Span
from spectr_demo.trace import NOT_ROUTED, ColumnTrace, RoutingTrace
from tests.conftest import IN_CONTEXT, BuildModel, SaveExpert, wait_until

PARTS = ("paint it a warm red", "then count", "and go")
MESSAGE = "\n".join(PARTS)
NAMES = ("red", "green", "blue")
Choose = Callable[[Sequence[int | None]], None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Says which expert each part of the message is for. With random experts that is chance."""
    monkeypatch.setattr(reading, "best_cut", lambda lengths, *_: spans_of_one(len(lengths)))
    monkeypatch.setattr(reading, "joined", lambda lanes, *_: lanes)
    read_parts = Reader._read_parts

    def choose(experts: Sequence[int | None]) -> None:
        def told(self: Reader, ids: Sequence[int], found: Sequence[Part]) -> ReadPrompt:
            read = read_parts(self, ids, found)
            runs = dict(read.runs)
            for part in range(len(found)):
                lane, expert = runs[part, part + 1], experts[part]
                assert lane.standing is not None
                standing = torch.full_like(lane.standing, -1)
                if expert is not None:
                    standing[expert] = 1
                runs[part, part + 1] = replace(lane, standing=standing)
            return replace(read, runs=runs)

        monkeypatch.setattr(Reader, "_read_parts", told)
        monkeypatch.setattr(Reader, "least_standing", lambda *_: 0.0)

    return choose


def spans_of_one(num: int) -> list[Span]:
    return [(i, i + 1) for i in range(num)]


def run(model: SpectrModel, columns: Sequence[str | RouterConfig], **options: object) -> Step:
    return model.compare(MESSAGE, columns, **{"max_new_tokens": 12, **options})  # type: ignore[arg-type]


def alone(model: SpectrModel, part: int, column: str, **options: object) -> Step:
    """A lane's request, without its line end, as a prompt of its own for the lane's expert."""
    options = {"max_new_tokens": 12, **options}
    return model.compare(PARTS[part], [column], **options)  # type: ignore[arg-type]


def column_of(step: Step, number: int = 0) -> ColumnTrace:
    assert step.trace is not None
    return step.trace.columns[number]


def own_tokens(model: SpectrModel) -> list[slice]:
    """Where each part stands in the prompt, without the line ends between them."""
    start, stop = model.template.request(model.encode(MESSAGE))
    starts = [start + MESSAGE.index(part) for part in PARTS]
    own = [slice(at, at + len(part)) for at, part in zip(starts, PARTS, strict=True)]
    assert own[-1].stop == stop
    return own


def name(expert: int | None) -> str:
    return "base" if expert is None else f"single:{NAMES[expert]}"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("experts", [[0, 2, 1], [2, None, 2], [None, None, 0]])
def test_each_lane_answers_as_if_it_were_alone(
    routed_model: SpectrModel, choose: Choose, experts: list[int | None], temperature: float
) -> None:
    """Beside other columns, whatever their length."""
    choose(experts)
    options = {"temperature": temperature, "seed": 5}
    expected = [alone(routed_model, i, name(e), **options) for i, e in enumerate(experts)]
    columns = ["base", IN_CONTEXT, "spectr", "spectr-calibrated", "uniform"]
    together = run(routed_model, columns, **options)
    own = together.columns[1]
    assert own.text == "\n".join(step.columns[0].text for step in expected)
    assert own.num_tokens == sum(step.columns[0].num_tokens for step in expected)
    assert run(routed_model, [IN_CONTEXT], **options).columns[0].text == own.text
    for i, column in enumerate(columns):
        if i != 1:
            one = routed_model.compare(MESSAGE, [column], max_new_tokens=12, **options)
            assert together.columns[i].text == one.columns[0].text


@pytest.mark.parametrize("columns", [[IN_CONTEXT], ["spectr", IN_CONTEXT, "base"]])
@pytest.mark.parametrize("experts", [[0, 2, 1], [2, None, 0], [None, 1, None]])
def test_a_trace_tells_of_all_lanes(
    routed_model: SpectrModel,
    choose: Choose,
    experts: list[int | None],
    columns: list[str | RouterConfig],
) -> None:
    choose(experts)
    step = run(routed_model, columns)
    number = columns.index(IN_CONTEXT)
    trace = column_of(step, number)
    ids = routed_model.encode(MESSAGE)
    start, stop = routed_model.template.request(ids)
    assert trace.num_prompt == len(ids)
    assert trace.token_ids[: len(ids)].tolist() == ids
    assert trace.text.startswith(routed_model.tokenizer.decode(ids))
    # The prompt: what lanes share is told of the first one before the request, the last after it.
    own = own_tokens(routed_model)
    places = {0: [slice(0, start), own[0]], 1: [own[1]], 2: [own[2], slice(stop, len(ids))]}
    at = len(ids)
    for lane, expert in enumerate(experts):
        single = alone(routed_model, lane, name(expert))
        other = column_of(single)
        num = other.num_tokens - other.num_prompt
        answer = slice(at, at + num)
        at += num
        own_start, closing = start, other.num_prompt - len(routed_model.template.closing)
        theirs = {
            0: [slice(0, start), slice(own_start, closing)],
            1: [slice(own_start, closing)],
            2: [slice(own_start, closing), slice(closing, other.num_prompt)],
        }[lane]
        pairs = zip([*places[lane], answer], [*theirs, slice(other.num_prompt, None)], strict=True)
        for here, there in pairs:
            assert trace.token_ids[here].tolist() == other.token_ids[there].tolist()
            for array in ("logprob", "entropy", "kl"):
                np.testing.assert_allclose(
                    getattr(trace, array)[here], getattr(other, array)[there], atol=2e-4
                )
            weights = trace.weights[here].sum(-1)
            assert (weights == (0 if expert is None else 1)).all()
            chosen = trace.experts[here]
            assert (chosen == (NOT_ROUTED if expert is None else expert)).all()
            assert (np.isfinite(trace.scores[here]) == (chosen != NOT_ROUTED)).all()
    assert at == trace.num_tokens
    # No lane has read the line ends.
    ends = [part.stop for part in own[:-1]]
    assert routed_model.tokenizer.decode([ids[end] for end in ends]) == "\n\n"
    assert (trace.experts[ends] == NOT_ROUTED).all() and not trace.weights[ends].any()
    assert np.isnan(trace.scores[ends]).all()
    for array in ("logprob", "entropy", "kl"):
        assert np.flatnonzero(np.isnan(getattr(trace, array))).tolist() == [0, *ends]


def test_scores_of_a_lane_are_the_certainty_of_its_layers(
    routed_model: SpectrModel, choose: Choose
) -> None:
    choose([0, 2, 1])
    trace = column_of(run(routed_model, [IN_CONTEXT]))
    router = RouterConfig(**trace.router)
    lanes = routed_model.lanes(router, routed_model.encode(MESSAGE))
    library = routed_model.library
    for lane in lanes:
        for bank, of_layers in lane.by_layer.items():
            for p, (layer, projection) in enumerate(zip(*library.places(bank), strict=True)):
                assert lane.expert is not None
                found = trace.scores[lane.start, layer, projection, 0]
                assert found == pytest.approx(float(of_layers[p, lane.expert]), abs=1e-4)


def test_a_trace_keeps_what_each_lane_was_chosen_by(
    build_model: BuildModel, save_expert: SaveExpert, choose: Choose
) -> None:
    model = build_model(
        [save_expert("red", seed=1, target_modules=["q_proj"]), save_expert("green", seed=2)]
    )
    choose([0, 1, None])
    step = run(model, ["spectr", IN_CONTEXT])
    assert column_of(step).reading is None
    trace = column_of(step, 1)
    read = trace.reading
    assert read is not None
    own = own_tokens(model)
    for number, part in enumerate(own):
        assert (read.lanes[part] == number).all()
    assert (read.lanes == -1).sum() == 2  # the line ends between them
    lanes = model.lanes(RouterConfig(**trace.router), model.encode(MESSAGE))
    for number, lane in enumerate(lanes):
        assert lane.standing is not None
        np.testing.assert_allclose(read.standing[number], lane.standing, atol=1e-4)
        # A mean over the projections: of one for red, of seven for green
        for expert in range(2):
            of_layer = [
                float(certainty[p, bank.expert_ids.tolist().index(expert)])
                for bank, certainty in lane.by_layer.items()
                for p, layer in enumerate(bank.layers)
                if layer == 1 and expert in bank.expert_ids
            ]
            assert len(of_layer) == (1, 7)[expert]
            expected = pytest.approx(np.mean(of_layer), abs=1e-4)
            assert read.certainty[number, 1, expert] == expected


@pytest.mark.parametrize(
    ("has_end", "piece"), [(True, "\n"), (False, "c\n")], ids=["end token", "cut off"]
)
def test_answers_of_lanes_are_lines_of_a_trace(has_end: bool, piece: str) -> None:
    """An end token between them is written as a line end; another token keeps its text."""
    rows = [
        Row(column=0, lane=Lane.whole([7]), answer=[8, 9], is_finished=True, has_end=has_end),
        Row(column=0, lane=Lane.whole([7]), answer=[8], is_finished=True, has_end=True),
    ]
    places = [(0, 0), (0, 1), (0, 2), (1, 1)]
    found = _with_line_ends(["a", "b", "c", "d"], rows, places)
    assert found == ["a", "b", piece, "d"], "the last lane's end stays"


def test_the_text_of_a_trace_is_the_answer(routed_model: SpectrModel, choose: Choose) -> None:
    choose([0, 2, 1])
    step = run(routed_model, [IN_CONTEXT])
    trace = column_of(step)
    text = "".join(trace.tokens[trace.num_prompt :])
    # Random bytes are full of parts of characters, which a run's text leaves out at its end.
    assert text.replace("�", "") == step.columns[0].text.replace("�", "")
    ends = np.cumsum([len(token) for token in trace.tokens]).tolist()
    assert trace.spans.tolist() == [list(span) for span in itertools.pairwise([0, *ends])]


def test_seeds_and_temperature_reach_each_lane(routed_model: SpectrModel, choose: Choose) -> None:
    choose([0, 2, 1])

    def sample(**options: object) -> str:
        return run(routed_model, [IN_CONTEXT], **options).columns[0].text

    assert sample(temperature=1.0, seed=1) == sample(temperature=1.0, seed=1)
    assert sample(temperature=1.0, seed=1) != sample(temperature=1.0, seed=2)
    assert sample(temperature=1.0, seed=1) != sample()


@pytest.mark.parametrize("num", [1, 5])
def test_max_new_tokens_is_of_each_lane(
    routed_model: SpectrModel, choose: Choose, num: int
) -> None:
    choose([0, 2, 1])
    settings = GenerationSettings(max_new_tokens=num)
    columns = [IN_CONTEXT, "base"]
    steps = list(routed_model.stream(MESSAGE, columns, settings, record=True))
    assert [step.columns[0].num_tokens for step in steps] == [3 * i for i in range(1, num + 1)] + [
        3 * num
    ]
    assert steps[-1].columns[0].is_finished and steps[-1].columns[1].num_tokens == num
    assert (steps[-1].columns[0].tokens_per_second > 0) == (num > 1)
    assert column_of(steps[-1]).num_tokens == len(routed_model.encode(MESSAGE)) + 3 * num


def test_a_column_goes_on_until_all_its_lanes_have_ended(
    routed_model: SpectrModel, choose: Choose
) -> None:
    choose([0, 2, 1])
    free = column_of(run(routed_model, [IN_CONTEXT]))
    answer = free.token_ids[free.num_prompt :].reshape(3, 12)
    ending = next(i for i in answer[0].tolist() if i not in answer[1])
    routed_model.model.generation_config.eos_token_id = [1, ending]
    settings = GenerationSettings(max_new_tokens=12)
    steps = list(routed_model.stream(MESSAGE, [IN_CONTEXT], settings))
    num = answer[0].tolist().index(ending) + 1
    counts = [step.columns[0].num_tokens for step in steps]
    assert counts[num] - counts[num - 1] < 3
    assert not steps[num].columns[0].is_finished and steps[-1].columns[0].is_finished
    assert counts == sorted(counts) and len(counts) == 13


def test_partial_traces_come_while_lanes_run(routed_model: SpectrModel, choose: Choose) -> None:
    choose([0, None, 1])
    settings = GenerationSettings(max_new_tokens=9)
    columns = ["spectr", IN_CONTEXT]
    stream = routed_model.stream(MESSAGE, columns, settings, record=True, trace_every=4)
    traces = [step.trace for step in stream if step.trace is not None]
    num_prompt = traces[0].columns[1].num_prompt
    assert [t.columns[1].num_tokens - num_prompt for t in traces] == [12, 24, 27]
    last = traces[-1].columns[1]
    for trace in traces[:-1]:
        column = trace.columns[1]
        num = (column.num_tokens - num_prompt) // 3
        assert np.isnan(column.kl).all()
        for lane in range(3):
            part = slice(num_prompt + lane * num, num_prompt + (lane + 1) * num)
            whole = slice(num_prompt + lane * 9, num_prompt + lane * 9 + num)
            assert np.array_equal(column.token_ids[part], last.token_ids[whole])
            assert np.array_equal(column.experts[part], last.experts[whole])
    ends = [part.stop for part in own_tokens(routed_model)[:-1]]
    assert np.flatnonzero(np.isnan(last.kl)).tolist() == [0, *ends]


def test_closing_cancels_a_run_with_lanes(routed_model: SpectrModel, choose: Choose) -> None:
    choose([0, 2, 1])
    settings = GenerationSettings(max_new_tokens=300)
    stream = routed_model.stream(MESSAGE, [IN_CONTEXT, "spectr"], settings, record=True)
    assert next(stream).columns[0].num_tokens == 3
    threads = threading.active_count()
    stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: threading.active_count() == threads - 1)
    assert run(routed_model, [IN_CONTEXT]).columns[0].num_tokens == 36


def test_an_error_while_the_request_is_read_reaches_the_reader(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(routed_model, [IN_CONTEXT])
    assert run(routed_model, [IN_CONTEXT]).is_last


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("composition", ["parameters", "outputs"])
def test_lanes_of_several_experts(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch, top_k: int, composition: str
) -> None:
    """What each lane has chosen is what its layers add, and what the trace tells."""
    monkeypatch.setattr(reading, "best_cut", lambda lengths, *_: spans_of_one(len(lengths)))
    monkeypatch.setattr(reading, "joined", lambda lanes, *_: lanes)
    router = replace(IN_CONTEXT, top_k=top_k, composition=composition)  # type: ignore[arg-type]
    step = run(routed_model, [router, "base"])
    trace = column_of(step)
    assert trace.experts.shape[-1] == top_k
    ends = [part.stop for part in own_tokens(routed_model)[:-1]]
    is_read = ~np.isin(np.arange(trace.num_tokens), ends)
    assert ((trace.weights > 0).sum(-1)[is_read] == top_k).all()
    np.testing.assert_allclose(trace.weights.sum(-1)[is_read], 1)
    assert (trace.experts[ends] == NOT_ROUTED).all() and not trace.weights[ends].any()
    lines = [routed_model.generate(part, router, max_new_tokens=12) for part in PARTS]
    assert step.columns[0].text == "\n".join(lines)


@pytest.mark.parametrize("experts", [[0, 2, 1], [2, None, 0], [None, None, None]])
def test_a_step_says_the_share_of_each_expert_without_a_trace(
    routed_model: SpectrModel, choose: Choose, experts: list[int | None]
) -> None:
    choose(experts)
    columns = ["base", IN_CONTEXT, "single:red", "uniform", "spectr"]
    *written, last = routed_model.stream(MESSAGE, columns, GenerationSettings(max_new_tokens=12))
    tokens = [alone(routed_model, i, name(e)).columns[0].num_tokens for i, e in enumerate(experts)]
    share: dict[str, float] = {}
    for expert, num in zip(experts, tokens, strict=True):
        if expert is not None:
            share[NAMES[expert]] = share.get(NAMES[expert], 0) + num / sum(tokens)
    base, in_context, single, uniform, looks = last.expert_shares
    assert in_context == pytest.approx(share)
    assert (base, single, looks) == ({}, {"red": 1}, None)
    assert uniform == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
    assert written[0].expert_shares[0] == {}
    assert last.trace is None


def test_two_columns_that_read_the_request(routed_model: SpectrModel) -> None:
    """Each has lanes of its own."""
    sure = replace(IN_CONTEXT, confidence=1.0)
    step = run(routed_model, [IN_CONTEXT, sure, "base"])
    assert [column.label for column in step.columns] == [
        "spectr-context",
        "spectr-context (2)",
        "base",
    ]
    for i, router in enumerate((IN_CONTEXT, sure)):
        assert run(routed_model, [router]).columns[0].text == step.columns[i].text


def test_a_chosen_expert_that_some_layers_lack(
    build_model: BuildModel, save_expert: SaveExpert, choose: Choose
) -> None:
    model = build_model(
        [save_expert("red", seed=1, target_modules=["q_proj"]), save_expert("green", seed=2)]
    )
    choose([0, 1, None])
    trace = column_of(run(model, ["spectr", IN_CONTEXT]), 1)
    own = own_tokens(model)
    q_proj = model.library.projections.index("q_proj")
    other = [p for p in range(len(model.library.projections)) if p != q_proj]
    first, second = trace.experts[own[0].start], trace.experts[own[1].start]
    assert (first[:, q_proj] == 0).all() and (first[:, other] == NOT_ROUTED).all()
    assert (second == 1).all()
    expected = model.generate(PARTS[0], "single:red", max_new_tokens=12)
    assert run(model, [IN_CONTEXT]).columns[0].text.startswith(expected)


def test_a_trace_with_lanes_is_saved_whole(
    routed_model: SpectrModel, choose: Choose, tmp_path: object
) -> None:
    choose([0, None, 1])
    step = run(routed_model, ["spectr", IN_CONTEXT])
    assert step.trace is not None
    file = f"{tmp_path}/trace.npz"
    step.trace.save(file)
    loaded = RoutingTrace.load(file)
    for column in step.trace.columns:
        other = loaded.column(column.label)
        assert other.tokens == column.tokens
        assert np.array_equal(other.experts, column.experts)
        assert np.array_equal(other.scores, column.scores, equal_nan=True)
    share = loaded.share("spectr-context", "prompt")
    lanes = loaded.column("spectr-context").reading.lanes[: loaded.columns[1].num_prompt]  # type: ignore[union-attr]
    of_base = (lanes == 1).sum() / (lanes >= 0).sum()
    assert share[2] == 0 and share.sum() == pytest.approx(1 - of_base, abs=1e-5)

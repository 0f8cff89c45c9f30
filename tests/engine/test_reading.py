"""What is read before a run: ordinary text, and the requests of a prompt."""

import json
import threading
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spectr_demo.base import generic
from spectr_demo.base.checkpoint import whole_embedded_checkpoint
from spectr_demo.base.generic import generic_prompts
from spectr_demo.base.prompts import Part, parts, shared_length, token_pieces
from spectr_demo.config import RouterConfig
from spectr_demo.engine import reading
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.reading import Lane, Listening, Reader, ReadPrompt, Requests
from spectr_demo.experts.library import load_experts
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.calibration import Calibration
from spectr_demo.routing.detection import certainty, detector
from spectr_demo.routing.lanes import Span
from spectr_demo.routing.routers import calibrated_scores, parse_router
from spectr_demo.routing.spectr import Score
from tests.conftest import IN_CONTEXT, BuildModel, SaveExpert, tiny_llama

PROMPTS = ["How are you?", "Tell me of a walk in the rain"]
TWO_LINES = "paint it red\ncount to two"


@pytest.fixture
def few_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "generic_text.json"
    file.write_text(json.dumps({"bases": {"tiny": PROMPTS}}))
    monkeypatch.setattr(generic, "GENERIC_TEXT", file)


def context(model: SpectrModel, **settings: object) -> RouterConfig:
    return parse_router(replace(IN_CONTEXT, **settings), model.library.names)  # type: ignore[arg-type]


def inputs_of(model: SpectrModel, ids: list[int]) -> dict[ExpertBank, Tensor]:
    """What the layers of each bank read of a text, by the bare base: (T, D_in)."""
    found: dict[ExpertBank, Tensor] = {}

    class Listen(Listening):
        def listen(self, bank: ExpertBank, x: Tensor) -> None:
            found[bank] = x[0]

    with torch.inference_mode(), routed(Listen()):
        model.model(torch.tensor([ids]))
    return found


def ordinary_inputs(model: SpectrModel) -> dict[ExpertBank, Tensor]:
    found: dict[ExpertBank, list[Tensor]] = {}
    for prompt in generic_prompts(model.base):
        ids = model.encode(prompt)
        opening = shared_length(model.template.opening, ids)
        for bank, x in inputs_of(model, ids).items():
            found.setdefault(bank, []).append(x[opening:])
    return {bank: torch.cat(x) for bank, x in found.items()}


def scores_of(
    model: SpectrModel, score: Score, known: Calibration | None
) -> dict[ExpertBank, Tensor]:
    """The scores of all tokens of the prompts that count, by bank: (N, P, E)."""
    found = {}
    for bank, x in ordinary_inputs(model).items():
        values = score(bank.project(x), bank.singular_values, RouterConfig(name="lag"))
        found[bank] = known.standardise(bank, score, values) if known else values
    return found


def cut_at(monkeypatch: pytest.MonkeyPatch, cut: list[Span], is_joined: bool = False) -> None:
    """Lanes of random experts are chance: have these."""
    monkeypatch.setattr(reading, "best_cut", lambda *_: cut)
    if not is_joined:
        monkeypatch.setattr(reading, "joined", lambda lanes, *_: lanes)


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("score", calibrated_scores())
def test_generic_text_has_mean_zero_and_deviation_one(
    routed_model: SpectrModel, score: Score
) -> None:
    raw = scores_of(routed_model, score, None)
    assert max(values.mean() for values in raw.values()) > 0.1
    for values in scores_of(routed_model, score, routed_model.calibration).values():
        mean, std = values.mean(0), values.std(0, correction=0)
        assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
        assert_close(std, torch.ones_like(std), atol=1e-3, rtol=0)


@pytest.mark.usefixtures("few_prompts")
def test_detectors_are_made_of_the_ordinary_prompts(routed_model: SpectrModel) -> None:
    """Read in one batch, they are those of each prompt read alone, without the opening."""
    inputs = ordinary_inputs(routed_model)
    found = routed_model.reader.ordinary.detectors
    assert found.keys() == inputs.keys() == set(routed_model.library.banks)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for bank, of_bank in inputs.items():
        if of_bank.shape[1] == 64:
            expected = detector(bank, of_bank).scores(x)
            assert_close(found[bank].scores(x), expected, atol=1e-2, rtol=1e-2)


def test_a_whole_prompt_by_hand(routed_model: SpectrModel) -> None:
    """Its certainty, from the base's own inputs: late tokens count most."""
    ids = routed_model.encode("paint it red")
    lane = routed_model.reader.whole(context(routed_model), ids)
    start, stop = routed_model.template.request(ids)
    assert (lane.start, lane.stop, lane.ids) == (start, stop, ids)
    fading = 0.85 ** torch.arange(len(ids) - start).flip(0)
    weights = fading / fading.sum()
    total, num = torch.zeros(3), 0
    for bank, x in inputs_of(routed_model, ids).items():
        scores = routed_model.reader.ordinary.detectors[bank].scores(x[start:])
        of_layers = certainty(torch.einsum("n,npe->pe", weights, scores))
        assert_close(lane.by_layer[bank], of_layers, atol=1e-3, rtol=1e-3)
        total += of_layers.sum(0)
        num += len(bank.paths)
    assert lane.standing is not None and lane.weights is not None
    expected = routed_model.reader.ordinary.standing(total / num)
    assert_close(lane.standing, expected, atol=1e-2, rtol=1e-2)
    assert lane.expert == int(expected.argmax())
    assert lane.weights.tolist() == torch.eye(3)[lane.expert].tolist()


def test_what_the_weights_of_tokens_are() -> None:
    requests = Requests.of([[5, 6], [7]], [8, 9])
    assert requests.ids.tolist() == [[5, 6, 8, 9], [7, 8, 9, 0]]
    assert requests.counts.tolist() == [[True] * 4, [True, True, True, False]]
    assert requests.owners.tolist() == [0, 0, 0, 0, 1, 1, 1]
    late = torch.tensor([0.85**3, 0.85**2, 0.85, 1])
    expected = torch.cat([late / late.sum(), late[1:] / late[1:].sum()])
    assert_close(requests.late, expected)
    assert_close(requests.whole, torch.tensor([0.25] * 4 + [0.5, 0.25, 0.25]))
    plain = Requests.of([[5, 6], [7]], [])
    assert_close(plain.whole, torch.tensor([0.5, 0.5, 1.0]))


def test_each_part_is_read_as_if_it_were_all_that_is_asked(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_at(monkeypatch, [(0, 1), (1, 2)])
    router = context(routed_model)
    ids = routed_model.encode(TWO_LINES)
    lanes = routed_model.lanes(router, ids)
    for lane, text in zip(lanes, ["paint it red", "count to two"], strict=True):
        assert routed_model.tokenizer.decode(ids[lane.start : lane.stop]) == text
        assert lane.ids == routed_model.encode(text)
        alone = routed_model.reader.whole(router, routed_model.encode(text))
        assert lane.standing is not None and alone.standing is not None
        assert_close(lane.standing, alone.standing, atol=1e-3, rtol=1e-3)
        for bank, of_layers in lane.by_layer.items():
            assert_close(of_layers, alone.by_layer[bank], atol=1e-2, rtol=1e-2)


def test_the_turns_before_are_read_in_every_lane(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_at(monkeypatch, [(0, 1), (1, 2)])
    turns = [{"role": "user", "content": "one\ntwo"}, {"role": "assistant", "content": "three."}]
    ids = routed_model.encode([*turns, {"role": "user", "content": TWO_LINES}])
    lanes = routed_model.lanes(context(routed_model), ids)
    for lane, text in zip(lanes, ["paint it red", "count to two"], strict=True):
        assert lane.ids == routed_model.encode([*turns, {"role": "user", "content": text}])
    alone = routed_model.reader.whole(context(routed_model), routed_model.encode("paint it red"))
    assert lanes[0].standing is not None and alone.standing is not None
    assert not torch.allclose(lanes[0].standing, alone.standing, atol=1e-3), "they are known"


@pytest.mark.parametrize(
    ("text", "requests"),
    [
        ("paint it red", ["paint it red"]),
        (TWO_LINES, ["paint it red", "count to two"]),
        ("paint it red \r\n\n  count to two", ["paint it red", "count to two"]),
        ("One two. Three?\n\nFour, and five", ["One two.", "Three?", "Four", ", and five"]),
        ("\npaint it\ncount\n", ["\npaint it", "count\n"]),
        ("paint it:\n\nred\nthen go", ["paint it:\n\nred", "then go"]),
    ],
)
def test_a_lane_is_its_request_asked_alone(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch, text: str, requests: list[str]
) -> None:
    """All of a message is in a lane but the blanks between two; those at its ends are kept."""
    cut_at(monkeypatch, [(i, i + 1) for i in range(len(requests))])
    ids = routed_model.encode(text)
    lanes = routed_model.lanes(context(routed_model), ids)
    assert [lane.ids for lane in lanes] == [routed_model.encode(each) for each in requests]
    start, stop = routed_model.template.request(ids)
    read = [t for lane in lanes for t in range(lane.start, lane.stop)]
    assert read == sorted(set(read)) and (read[0], read[-1]) == (start, stop - 1)
    left = [ids[t] for t in range(start, stop) if t not in read]
    assert not str(routed_model.tokenizer.decode(left)).strip()


@pytest.mark.usefixtures("few_prompts")
@pytest.mark.embedded
@pytest.mark.parametrize("between", ["\n", "\n\n", "\r\n", " \n", "\n \n"])
@pytest.mark.parametrize(
    "requests",
    [
        ("What is 3 + 4?", "Name a colour"),
        ("Translate to Spanish: hello", "2. Count to two.", "- Sag Grüße!"),
        ("日本語で答えて", "SELECT * FROM t;", "¿Qué hora es?"),
    ],
)
def test_lines_in_the_tokens_of_the_embedded_default(
    routed_model: SpectrModel,
    expert_folders: list[str],
    monkeypatch: pytest.MonkeyPatch,
    requests: tuple[str, ...],
    between: str,
) -> None:
    """Its tokens may be several characters, or part of one."""
    checkpoint = whole_embedded_checkpoint(torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    llama = tiny_llama(len(tokenizer))
    base = replace(routed_model.base, model=llama, tokenizer=tokenizer)
    model = SpectrModel(base, load_experts(expert_folders, llama))
    cut_at(monkeypatch, [(i, i + 1) for i in range(len(requests))])
    router = context(model)
    lanes = model.lanes(router, model.encode(between.join(requests)))
    for lane, request in zip(lanes, requests, strict=True):
        ids = model.encode(request)
        assert lane.ids == ids
        alone = model.reader.whole(router, ids)
        assert lane.standing is not None and alone.standing is not None
        assert_close(lane.standing, alone.standing, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_runs_are_read_alike_however_many_at_once(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """None knows of those that were read before it, after the same beginning."""
    monkeypatch.setattr(reading, "_RUNS_AT_ONCE", at_once)
    router = context(routed_model)
    lines = ["a much longer line than the others are", "go", "count to two"]
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    for before in ([], turns):
        for cut in ([(0, 1), (1, 2), (2, 3)], [(0, 2), (2, 3)], [(0, 1), (1, 3)], [(0, 3)]):
            cut_at(monkeypatch, cut)
            messages = [*before, {"role": "user", "content": "\n".join(lines)}]
            lanes = routed_model.lanes(router, routed_model.encode(messages))
            for (first, end), lane in zip(cut, lanes, strict=True):
                text = "\n".join(lines[first:end])
                ids = routed_model.encode([*before, {"role": "user", "content": text}])
                alone = routed_model.reader.whole(router, ids)
                assert lane.ids == ids
                assert lane.standing is not None and alone.standing is not None
                assert_close(lane.standing, alone.standing, atol=1e-3, rtol=1e-3)


def test_a_message_is_cut_where_that_explains_it_better(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two experts, each of which is known by the words of its line."""
    found: list[list[Span]] = []
    read_parts = Reader._read_parts

    def told(self: Reader, ids: Sequence[int], of_message: Sequence[Part]) -> ReadPrompt:
        read = read_parts(self, ids, of_message)
        best = {(0, 1): [0.9, 0, 0], (1, 2): [0, 0, 0.9]}
        explained = {run: torch.tensor(best.get(run, [0.4, 0.4, 0.4])) for run in read.runs}
        runs = {run: replace(lane, standing=explained[run]) for run, lane in read.runs.items()}
        found.append(sorted(runs))
        return ReadPrompt(of_message, runs, explained)

    monkeypatch.setattr(Reader, "_read_parts", told)
    lanes = routed_model.lanes(context(routed_model), routed_model.encode(TWO_LINES))
    assert found == [[(0, 1), (0, 2), (1, 2)]]
    assert [lane.expert for lane in lanes] == [0, 2]


def test_other_routers_take_a_prompt_as_a_whole(routed_model: SpectrModel) -> None:
    ids = routed_model.encode(TWO_LINES)
    for name in ("base", "spectr", "uniform"):
        (lane,) = routed_model.lanes(parse_router(name, routed_model.library.names), ids)
        assert (lane.start, lane.stop, lane.ids) == (0, len(ids), ids)
        assert lane.expert is None and lane.weights is None and not lane.by_layer


def test_a_long_message_is_a_text(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All runs of its parts would take too long to read."""
    sizes = []
    read = Reader.read

    def spy(self: Reader, beginning: list[int], some: list[tuple[Requests, Listening]]) -> None:
        sizes.append([tuple(requests.ids.shape) for requests, _ in some])
        read(self, beginning, some)

    assert routed_model.reader.ordinary is not None
    monkeypatch.setattr(Reader, "read", spy)
    router = context(routed_model)
    lines = "\n".join(["paint it red"] * 5)
    closing = len(routed_model.template.closing)
    routed_model.lanes(router, routed_model.encode(lines))
    two_lines = len("paint it red\npaint it red")
    assert sizes == [[(8, two_lines + closing), (7, len(lines) + closing)]], "short ones together"
    monkeypatch.setattr(reading, "_MOST_READ", 15 * len(lines) - 1)
    (lane,) = routed_model.lanes(router, routed_model.encode(lines))
    assert sizes[1:] == [[(1, len(lines) + closing)]]
    assert lane.ids == routed_model.encode(lines)


def test_a_base_without_a_template(
    routed_model: SpectrModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = deepcopy(tokenizer)
    plain.chat_template = None
    routed_model.detach()
    model = SpectrModel(replace(routed_model.base, tokenizer=plain), routed_model.library)
    cut_at(monkeypatch, [(0, 1), (1, 2)])
    lanes = model.lanes(context(model), model.encode(TWO_LINES))
    assert [plain.decode(lane.ids) for lane in lanes] == ["paint it red", "count to two"]
    assert all(lane.expert is not None for lane in lanes)
    step = model.compare(TWO_LINES, ["base", IN_CONTEXT], max_new_tokens=4)
    assert step.trace is not None
    end = len("paint it red")  # nothing stands before a lane's first token, and none reads the end
    for column, unknown in zip(step.trace.columns, [[0], [0, end, end + 1]], strict=True):
        assert np.flatnonzero(np.isnan(column.kl)).tolist() == unknown
    model.detach()


def test_ordinary_text_is_measured_once(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks first, and however many ask at once."""
    measured, measure = [], Reader._measure

    def spy(self: Reader) -> reading.Ordinary:
        measured.append(threading.current_thread().name)
        return measure(self)

    monkeypatch.setattr(Reader, "_measure", spy)
    found: list[list[Lane]] = []
    ids = routed_model.encode(TWO_LINES)
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        found.append(routed_model.lanes(context(routed_model, confidence=0.5), ids))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1
    assert len(found) == 4
    assert (
        len({tuple((lane.start, lane.stop, lane.expert) for lane in each) for each in found}) == 1
    )


def test_the_least_standing_is_that_of_so_many_ordinary_prompts(
    routed_model: SpectrModel,
) -> None:
    reader = routed_model.reader
    best = []
    for prompt in generic_prompts(routed_model.base):
        lane = reader.whole(context(routed_model), routed_model.encode(prompt))
        assert lane.standing is not None
        best.append(float(lane.standing.max()))
    ordinary = reader.ordinary
    most = ordinary.standing(ordinary.certainty).amax(-1)
    assert_close(most, torch.tensor(best), atol=1e-3, rtol=1e-3)
    for confidence in (0.0, 0.8, 1.0):
        least = reader.least_standing(context(routed_model, confidence=confidence))
        assert least == pytest.approx(np.quantile(best, confidence), abs=1e-3)
    assert reader.least_standing(context(routed_model, confidence=None)) is None


@pytest.mark.parametrize("confidence", [None, 0.0, 0.5, 1.0])
def test_confidence_is_the_share_of_ordinary_prompts_without_an_expert(
    routed_model: SpectrModel, confidence: float | None
) -> None:
    router = context(routed_model, confidence=confidence)
    prompts = generic_prompts(routed_model.base)
    experts = [
        routed_model.reader.whole(router, routed_model.encode(prompt)).expert for prompt in prompts
    ]
    share = sum(expert is None for expert in experts) / len(prompts)
    assert share == pytest.approx(confidence or 0, abs=1.5 / len(prompts))


def test_several_experts_of_one_request(routed_model: SpectrModel) -> None:
    ids = routed_model.encode("paint it red")
    reader = routed_model.reader
    one, two = (reader.whole(context(routed_model, top_k=k), ids) for k in (1, 2))
    soft = reader.whole(context(routed_model, top_k=2, weighting="softmax", temperature=0.1), ids)
    assert one.standing is not None and two.weights is not None and soft.weights is not None
    order = one.standing.argsort(descending=True).tolist()
    assert one.expert == two.expert == soft.expert == order[0], "the best one"
    assert two.weights[order].tolist() == [0.5, 0.5, 0]
    expected = (one.standing[order[:2]] / 0.1).softmax(-1)
    assert_close(soft.weights[order[:2]], expected, atol=1e-3, rtol=1e-3)


def test_experts_of_other_layers(build_model: BuildModel, save_expert: SaveExpert) -> None:
    """Each is judged by the layers that it has."""
    model = build_model(
        [
            save_expert("attention", seed=1, target_modules=["q_proj", "v_proj"]),
            save_expert("all", seed=2),
            save_expert("mlp", seed=3, r=2, target_modules=["down_proj"]),
        ]
    )
    ids = model.encode(TWO_LINES)
    lane = model.reader.whole(context(model), ids)
    assert lane.standing is not None
    total, num = torch.zeros(3), torch.zeros(3)
    for bank, of_layers in lane.by_layer.items():
        assert of_layers.shape == (len(bank.paths), bank.num_experts)
        total[bank.expert_ids] += of_layers.sum(0)
        num[bank.expert_ids] += len(bank.paths)
    assert num.tolist() == [4, 14, 2]
    assert_close(lane.standing, model.reader.ordinary.standing(total / num))
    step = model.compare(TWO_LINES, [IN_CONTEXT, "base"], max_new_tokens=4)
    assert step.trace is not None and step.trace.columns[0].is_routed


def test_permuting_experts_permutes_the_lanes(
    build_model: BuildModel, expert_folders: list[str]
) -> None:
    order = [2, 0, 1]
    models = build_model(expert_folders), build_model([expert_folders[i] for i in order])
    for top_k in (1, 2):
        for text in ("paint it red", TWO_LINES, "One. Two. Three, and four\nfive"):
            one, other = (
                model.lanes(context(model, top_k=top_k), model.encode(text)) for model in models
            )
            assert [lane.ids for lane in one] == [lane.ids for lane in other]
            assert [lane.expert for lane in one] == [order[lane.expert or 0] for lane in other]


def test_parts_of_the_tiny_base(routed_model: SpectrModel) -> None:
    """What the tests above take for granted."""
    ids = routed_model.encode(TWO_LINES)
    start, stop = routed_model.template.request(ids)
    found = parts(token_pieces(routed_model.tokenizer, ids), start, stop)
    assert [part.is_next for part in found] == [False, True]

"""The operators on a CPU: their reference against the method; their kernels, in Triton's
interpreter, against the reference. `test_gpu.py` compiles the same kernels.
"""

import sys

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from spectr_demo.gpu.operators import add_chosen_, project_kept, weigh
from spectr_demo.gpu.rules import Rule, Rules
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.routing.spectr import align, delta
from tests.gpu.cases import (
    CASES,
    UNWRITTEN,
    Case,
    check_add_chosen,
    check_project_kept,
    check_weigh,
    inputs_of,
)

NAMES = [f"expert {e}" for e in range(6)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators run their kernels."""
    if sys.platform != "linux":
        pytest.skip("Triton is for Linux alone")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a CUDA device, see test_gpu.py")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(params=["reference", "kernels"])
def code(request: pytest.FixtureRequest) -> None:
    """What the operators run."""
    if request.param == "kernels":
        request.getfixturevalue("kernels")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_add_what_the_reference_adds(case: Case, kernels: None) -> None:
    check_add_chosen(case, "cpu")


@pytest.mark.parametrize("case", [c for c in CASES if not c.kept], ids=lambda case: case.name)
def test_kernels_weigh_as_the_reference_does(case: Case, kernels: None) -> None:
    check_weigh(case, "cpu")


@pytest.mark.parametrize(
    ("E", "F", "r", "dtype", "x_dtype"),
    [
        (1, 1, 1, torch.float32, torch.float32),
        (5, 5, 6, torch.float16, torch.float32),
        (1000, 20, 3, torch.bfloat16, torch.bfloat16),
        (12, 3, 64, torch.float32, torch.float16),
    ],
)
def test_kernels_project_as_the_reference_does(
    E: int, F: int, r: int, dtype: torch.dtype, x_dtype: torch.dtype, kernels: None
) -> None:
    check_project_kept("cpu", E=E, F=F, r=r, dtype=dtype, x_dtype=x_dtype)


@pytest.mark.parametrize("is_merged", [False, True], ids=["outputs", "parameters"])
def test_every_router_that_is_measured_adds_its_delta(is_merged: bool, code: None) -> None:
    """All in one batch, each row with a router of its own."""
    torch.manual_seed(0)
    composition = "parameters" if is_merged else "outputs"
    A, B = align(torch.randn(6, 4, 24), torch.randn(6, 16, 4), 1.0)
    bank_A, bank_B = A.flatten(0, 1), B.mT.flatten(0, 1).contiguous()
    singular_values = torch.linalg.vector_norm(B, dim=1).unsqueeze(0)
    rows, configs = [], []
    for key, row in ROUTERS.items():
        for top_k in (1, 4) if row.measure else ():
            config = parse_router(
                key, NAMES, top_k=top_k, composition=composition, prefilter=4, temperature=0.7
            )
            temperature = config.temperature if config.weighting == "softmax" else 0.0
            kept = config.prefilter if row.is_filtered else None
            configs.append(config)
            rows.append(Rule(row.measure, top_k, kept, temperature, is_merged))
    assert len(rows) >= 12
    R = len(rows)
    x, y = torch.randn(R, 24), torch.randn(R, 16)
    z = (x @ bank_A.mT).view(R, 1, 6, 4)
    mean, std = torch.zeros(R, 1, 6), torch.ones(R, 1, 6)
    expected = []
    for i, config in enumerate(configs):
        score = ROUTERS[config.name].score
        assert score is not None
        if config.calibrated:
            mean[i], std[i] = torch.randn(6), torch.rand(6) + 0.5

        def standardised(z: Tensor, singular_values: Tensor, config, score=score, i=i) -> Tensor:
            return (score(z, singular_values, config) - mean[i, 0]) / std[i, 0]

        expected.append(y[i] + delta(x[i], A, B, standardised, config))
    rules = Rules.of(rows, 6, device="cpu", mean=mean, std=std)
    add_chosen_([y], z, [bank_B], singular_values, rules)
    assert_close(y, torch.stack(expected))


def test_a_prompt_gets_what_its_tokens_get(code: None) -> None:
    """`weigh` and a product, against `add_chosen_` of each token."""
    case = CASES[0]
    rules, z, Bs, singular_values, _ = inputs_of(case, "cpu")
    R, T = len(case.rows), case.T
    tokens = z.view(R, T, *z.shape[1:]).clone()
    weighed = weigh(z, singular_values, rules)
    for t in range(T):
        ys = [torch.zeros(R, D) for D in case.D]
        add_chosen_(ys, tokens[:, t].contiguous(), Bs, singular_values, rules)
        for place, y in enumerate(ys):
            of_prompt = weighed[:, place].flatten(1) @ Bs[place]
            assert_close(of_prompt.view(R, T, -1)[:, t], y)


def test_experts_that_were_kept_before_are_those_that_the_filter_keeps(code: None) -> None:
    torch.manual_seed(0)
    R, P, E, r = 2, 2, 50, 4
    x, A = torch.randn(R, 16), torch.randn(P * E * r, 16)
    Bs = [torch.randn(E * r, D) for D in (24, 8)]
    S = torch.rand(P, E, r)
    rules = Rules.of([Rule("length", 3, 5), Rule("output", 2, 5)], E, device="cpu")
    z, kept = project_kept(x, A, (x @ A[::r].mT).view(R, P, E), 5)
    results = []
    for values, of_bank in ((z, kept), ((x @ A.mT).view(R, P, E, r), None)):
        ys, step = [torch.zeros(R, 24), torch.zeros(R, 8)], torch.zeros(1, dtype=torch.int64)
        places = torch.zeros(R, 1, P, 3, dtype=torch.int16)
        weights, scores = torch.zeros(R, 1, P, 3), torch.zeros(R, 1, P, 3)
        record = {"places": places, "weights": weights, "scores": scores, "step": step}
        add_chosen_(ys, values, Bs, S, rules, kept=of_bank, **record)
        results.append((*ys, places, weights, scores))
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


def choose(z: Tensor, *rows: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (R, E) of z (R, E), a rank of 1 and an output for each expert; and what was recorded."""
    R, E = z.shape
    K = max(row.top_k for row in rows)
    record = {
        "places": torch.full((R, 1, 1, K), UNWRITTEN, dtype=torch.int32),
        "weights": torch.full((R, 1, 1, K), float(UNWRITTEN)),
        "scores": torch.full((R, 1, 1, K), float(UNWRITTEN)),
        "step": torch.zeros(1, dtype=torch.int64),
    }
    y = torch.zeros(R, E)
    rules = Rules.of(rows, E, device="cpu")
    add_chosen_([y], z.view(R, 1, E, 1), [torch.eye(E)], torch.ones(1, E, 1), rules, **record)
    return y, *(record[name].view(R, K) for name in ("places", "weights", "scores"))


def test_by_hand(code: None) -> None:
    y, places, weights, scores = choose(
        torch.tensor([[-4.0, 1.0, 2.0], [-4.0, 1.0, 2.0], [0.0, 3.0, -3.5]]),
        Rule("length", 2),
        Rule("first", 2, is_merged=True),
        Rule("length", 1),
    )
    assert y.tolist() == [[-2, 0, 1], [-0.5, 0, -0.5], [0, 0, -3.5]]
    assert places[:2].tolist() == [[0, 2]] * 2 and places[2, 0] == 2
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5], [1, 0]]
    assert scores[:2].tolist() == [[4, 2]] * 2 and scores[2, 0] == 3.5


def test_of_equal_scores_the_first_are_chosen(kernels: None) -> None:
    z = torch.tensor([[1.0, 2.0, -2.0, 3.0, 2.0, 0.0, 0.0]])
    assert choose(z, Rule("length", 3))[1].tolist() == [[3, 1, 2]]
    assert choose(z, Rule("length", 7))[1].tolist() == [[3, 1, 2, 4, 0, 5, 6]]
    kept = choose(z, Rule("length", 2, filter=2))
    assert kept[1].tolist() == [[3, 1]]


def test_nan_is_the_largest_score_and_stays_in_its_row(code: None) -> None:
    z = torch.tensor([[1.0, 5.0, 2.0], [1.0, torch.nan, 2.0], [9.0, 8.0, torch.inf]])
    y, places, _, scores = choose(z, *[Rule("length", 2)] * 3)
    assert places.tolist() == [[1, 2], [1, 2], [2, 0]]
    assert y[0].tolist() == [0, 2.5, 1] and y[1].isnan().any()
    assert scores[1, 0].isnan() and scores[2].tolist() == [torch.inf, 9]
    alone = choose(z[:1], Rule("length", 2))
    assert torch.equal(alone[0], y[:1])


def test_experts_that_are_zero_add_nothing_and_the_others_are_chosen(code: None) -> None:
    y, _, weights, scores = choose(torch.tensor([[0.0, 0.0, 3.0, 0.0]]), Rule("length", 3))
    assert_close(y, torch.tensor([[0, 0, 1.0, 0]]))
    assert_close(weights, torch.full((1, 3), 1 / 3))
    assert scores.tolist() == [[3, 0, 0]]


def test_where_it_is_recorded_is_read_from_the_device(code: None) -> None:
    """A slot that is not there is not written."""
    rules = Rules.of([Rule("length", 1)], 2, device="cpu")
    z, B, S = torch.ones(1, 1, 2, 1), torch.eye(2), torch.ones(1, 2, 1)
    places = torch.full((1, 3, 1, 1), UNWRITTEN, dtype=torch.int16)
    weights, scores = torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    step = torch.tensor([0])
    for t in range(3):
        step.fill_(t)
        z[0, 0, 0] = t  # 0, 1, 2 against 1
        y, first_two = torch.zeros(1, 2), [part[:, :2] for part in (places, weights, scores)]
        record = dict(zip(("places", "weights", "scores"), first_two, strict=True))
        add_chosen_([y], z, [B], S, rules, **record, step=step)
    assert weights.flatten().tolist() == [1, 1, 0]
    assert places[0, 0, 0, 0] == 1 and places[0, 2, 0, 0] == UNWRITTEN
    assert scores.flatten().tolist() == [1, 1, 0]


def test_rows_of_y_may_lie_apart(code: None) -> None:
    """As those of layers whose outputs are one tensor."""
    case = CASES[0]
    rules, z, Bs, S, _ = inputs_of(case, "cpu")
    R = rules.num_rows
    z, first = z[:R].contiguous(), 3
    wide, plain = torch.zeros(R, 200), [torch.zeros(R, D) for D in case.D]
    add_chosen_(list(wide[:, first : first + sum(case.D)].split(case.D, dim=1)), z, Bs, S, rules)
    add_chosen_(plain, z, Bs, S, rules)
    expected = torch.zeros_like(wide)
    expected[:, first : first + sum(case.D)] = torch.cat(plain, dim=1)
    assert torch.equal(wide, expected)


def test_rules_are_no_more_than_a_bank_can_fill() -> None:
    rows = [Rule("length", 4), Rule("output", 1, filter=20), Rule(), Rule("first", 2, 2, 0.5, True)]
    rules = Rules.of(rows, 3, device="cpu")
    assert rules.most == 3
    assert rules.measure.tolist() == [0, 2, -1, 1] and rules.top_k.tolist() == [3, 1, 0, 2]
    assert rules.filter.tolist() == [3, 3, 3, 2] and rules.is_merged.tolist() == [0, 0, 0, 1]
    assert rules.temperature.tolist() == [0, 0, 0, 0.5]


class Counted(TorchDispatchMode):
    """Names what torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_each_is_one_operator_and_does_nothing_on_meta() -> None:
    rules, z, Bs, S, _ = inputs_of(CASES[0], "meta")
    z = z[: rules.num_rows].contiguous()
    x, *ys = (torch.empty(rules.num_rows, 80, device="meta") for _ in range(3))
    A = torch.empty(2 * 5 * 6, 80, device="meta", dtype=torch.float16)
    arrows = torch.empty(8, 2, 5, device="meta")
    with Counted() as counted:
        add_chosen_(ys, z, Bs, S, rules)
        weighed = weigh(z, S, rules)
        values, kept = project_kept(x, A, arrows, 3)
    assert counted.names == [
        f"spectr.{name}.default" for name in ("add_chosen_", "weigh", "project_kept")
    ]
    assert weighed.shape == z.shape and weighed.dtype == z.dtype
    assert values.shape == (8, 2, 3, 6) and values.dtype == torch.float32
    assert kept.shape == (8, 2, 3) and kept.dtype == torch.int32


def test_they_change_what_their_schemas_say() -> None:
    """And what they give on `meta` has the shape and dtype of what they give elsewhere."""
    rules, z, Bs, S, _ = inputs_of(CASES[0], "cpu")
    z = z[: rules.num_rows].contiguous()
    record = [torch.zeros(8, 2, 2, 5, dtype=torch.int16), *torch.zeros(2, 8, 2, 2, 5)]
    checks = ("test_schema", "test_faketensor")

    def check(name: str, *args: object) -> None:
        torch.library.opcheck(getattr(torch.ops.spectr, name).default, args, test_utils=checks)

    ys = [torch.ones(8, D) for D in CASES[0].D]
    check("add_chosen_", ys, z, Bs, S, *rules.flat, None, *record, torch.tensor([1]))
    check("weigh", z, S, *rules.flat, *(part[:, 0].contiguous() for part in record))
    check("project_kept", torch.randn(3, 8), torch.randn(2 * 5 * 4, 8), torch.randn(3, 2, 5), 2)

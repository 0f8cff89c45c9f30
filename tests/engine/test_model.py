"""What must hold of a run: weights, neighbours, cache, threads, cancelling, replay, bad input."""

import gc
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from spectr_demo.config import GenerationSettings, RouterConfig
from spectr_demo.engine.layers import RoutedLinear, routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.run import Step
from spectr_demo.experts import library as experts
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import ROUTERS, parse_router
from spectr_demo.trace import NOT_ROUTED, ColumnTrace, RoutingTrace, mean_logprob
from tests.conftest import IN_CONTEXT, BuildModel, SaveExpert, wait_until

PROMPT = "What is the capital of France?"
CONTEXT = ["spectr-calibrated", IN_CONTEXT]
ALL = ["base", "single:red", "uniform", "arrow", "spectr", "spectr-paper", "lag", "norm", *CONTEXT]


def run(model: SpectrModel, columns: Sequence[str | RouterConfig], **options: object) -> Step:
    return model.compare(PROMPT, columns, **{"max_new_tokens": 24, **options})  # type: ignore[arg-type]


def texts(step: Step) -> list[str]:
    return [column.text for column in step.columns]


def trace_of(step: Step) -> RoutingTrace:
    assert step.trace is not None
    return step.trace


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_rows_text_does_not_depend_on_its_neighbours(
    routed_model: SpectrModel, temperature: float
) -> None:
    together = run(routed_model, ALL, temperature=temperature, seed=3)
    alone = [run(routed_model, [column], temperature=temperature, seed=3) for column in ALL]
    assert texts(together) == [texts(step)[0] for step in alone]
    assert len(set(texts(together))) > 3, "the columns would hide a mix-up if they all agreed"


@pytest.mark.parametrize("columns", [["spectr"], ["base", "spectr"]])
def test_the_output_embedding_never_reads_a_slice(
    routed_model: SpectrModel, columns: list[str]
) -> None:
    """By its strides torch would decide to copy the whole embedding for every row."""
    strides = []
    head = routed_model.model.get_output_embeddings()
    hook = head.register_forward_hook(
        lambda module, args, output: strides.append((args[0].shape, args[0].stride()))
    )
    run(routed_model, columns, max_new_tokens=3, record=False)
    hook.remove()
    assert strides == [((len(columns), 1, D := head.in_features), (D, D, 1))] * 3


def test_weights_are_distributions_over_at_most_k(routed_model: SpectrModel) -> None:
    trace = trace_of(run(routed_model, ALL))
    for column in trace.columns:
        read = column.weights[:-1]  # the last token was written and never read
        assert (read >= 0).all()
        total = np.full(len(read), 0 if column.label == "base" else 1)
        assert np.allclose(read.sum(-1), total[:, None, None], atol=1e-6)
        top_k = column.router["top_k"]
        if top_k is not None:
            assert ((read > 0).sum(-1) <= top_k).all()
        if ROUTERS[column.router["name"]].score:
            assert (column.experts[-1] == NOT_ROUTED).all()
            is_routed = column.experts[:-1] != NOT_ROUTED
            assert (np.isfinite(column.scores[:-1]) == is_routed).all()
    assert [c.experts.shape[3] for c in trace.columns] == [0, 1, 3, 3, 1, 3, 1, 1, 1, 1]


def test_lag_is_spectr_with_a_full_filter_and_arrow_with_a_filter_of_one(
    routed_model: SpectrModel,
) -> None:
    columns = [
        "spectr",
        RouterConfig(name="lag", top_k=1, prefilter=3),
        RouterConfig(name="arrow", top_k=1),
        RouterConfig(name="lag", top_k=1, prefilter=1),
    ]
    step = run(routed_model, columns)
    spectr, lag_all, arrow, lag_one = (column.experts for column in trace_of(step).columns)
    assert np.array_equal(spectr, lag_all)
    assert np.array_equal(arrow, lag_one)
    assert not np.array_equal(spectr, arrow)


def test_permuting_experts_permutes_the_trace_and_changes_no_text(
    build_model: BuildModel, expert_folders: list[str]
) -> None:
    order = [2, 0, 1]
    columns = ["uniform", "arrow", "spectr", "spectr-paper", "norm", *CONTEXT]
    first = run(build_model(expert_folders), columns)
    second = run(build_model([expert_folders[i] for i in order]), columns)
    assert texts(first) == texts(second)
    names = trace_of(first).expert_names
    others = trace_of(second).expert_names
    permuted = np.vectorize(lambda e: e if e == NOT_ROUTED else names.index(others[e]))
    for label in ("spectr", "norm", "spectr-calibrated", "spectr-context"):
        expected = trace_of(first).column(label).experts
        actual = trace_of(second).column(label).experts
        assert np.array_equal(permuted(actual[:-1]), expected[:-1])


def test_zero_padding_a_rank_changes_nothing(
    build_model: BuildModel, save_expert: SaveExpert, expert_folders: list[str]
) -> None:
    """Rank 2 beside rank 8 is padded in the bank: its own column must not notice."""
    small, large = save_expert("small", seed=5, r=2), save_expert("large", seed=6, r=8)
    alone = run(build_model([small]), ["single:small"])
    beside = run(build_model([small, large]), ["single:small"])
    assert texts(alone) == texts(beside)


def test_cached_decoding_equals_the_full_forward_pass(routed_model: SpectrModel) -> None:
    columns = ["base", "uniform", "arrow", "spectr", "spectr-paper", *CONTEXT]
    trace = trace_of(run(routed_model, columns))
    for column in trace.columns:
        logits = _forward(routed_model, column, _plan(routed_model, column))
        logprob = logits.log_softmax(-1).gather(-1, _ids(column)[1:, None])[:, 0]
        assert_close(logprob.numpy(), column.logprob[1:], atol=1e-4, rtol=1e-4)
        answer = column.token_ids[column.num_prompt :]
        assert np.array_equal(logits.argmax(-1)[column.num_prompt - 1 :].numpy(), answer)


def test_replaying_the_traces_weights_gives_the_same_logits(routed_model: SpectrModel) -> None:
    columns = ["single:blue", "uniform", "arrow", "spectr", "spectr-paper", "lag", "norm", *CONTEXT]
    trace = trace_of(run(routed_model, columns))
    for column in trace.columns:
        plan = _plan(routed_model, column)
        expected = _forward(routed_model, column, plan)
        replayed = _forward(routed_model, column, _Replay(routed_model, trace, column))
        assert_close(replayed, expected, atol=1e-4, rtol=1e-4)


def test_statistics_of_tokens(routed_model: SpectrModel) -> None:
    trace = trace_of(run(routed_model, ["base", "spectr"]))
    for column in trace.columns:
        routed_logits = _forward(routed_model, column, _plan(routed_model, column))
        base_logits = _forward(routed_model, column, None)
        p, q = routed_logits.log_softmax(-1), base_logits.log_softmax(-1)
        assert_close(column.kl[1:], (p.exp() * (p - q)).sum(-1).numpy(), atol=1e-4, rtol=1e-3)
        assert_close(column.entropy[1:], -(p.exp() * p).sum(-1).numpy(), atol=1e-4, rtol=1e-3)
        assert np.isnan([column.logprob[0], column.entropy[0], column.kl[0]]).all()
    assert (trace.column("base").kl[1:] == 0).all()
    assert trace.column("spectr").kl[1:].min() > 0
    assert mean_logprob(trace, "spectr") == pytest.approx(
        float(trace.column("spectr").logprob[-24:].mean())
    )


def test_two_runs_in_two_threads_do_not_mix(routed_model: SpectrModel) -> None:
    columns = {"a": ["spectr", "base"], "b": ["single:red", "arrow", "uniform"]}
    alone = {key: run(routed_model, value, temperature=0.7) for key, value in columns.items()}
    together: dict[str, Step] = {}
    barrier = threading.Barrier(2)

    def work(key: str) -> None:
        barrier.wait()
        together[key] = run(routed_model, columns[key], temperature=0.7)

    threads = [threading.Thread(target=work, args=(key,)) for key in columns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in columns:
        assert texts(together[key]) == texts(alone[key])
        for column in trace_of(alone[key]).columns:
            other = trace_of(together[key]).column(column.label)
            assert np.array_equal(other.experts, column.experts)


def test_steps_grow_token_by_token(routed_model: SpectrModel) -> None:
    settings = GenerationSettings(max_new_tokens=9)
    steps = list(routed_model.stream(PROMPT, ["base", "spectr"], settings, record=True))
    assert [step.columns[1].num_tokens for step in steps] == [*range(1, 10), 9]
    assert [step.is_last for step in steps] == [False] * 9 + [True]
    assert [step.trace is not None for step in steps] == [False] * 9 + [True]
    assert all(column.is_finished for column in steps[-1].columns)
    assert steps[0].columns[0].tokens_per_second == 0
    assert steps[-1].columns[0].tokens_per_second > 0


def test_partial_traces_come_while_it_runs(routed_model: SpectrModel) -> None:
    settings = GenerationSettings(max_new_tokens=12)
    stream = routed_model.stream(PROMPT, ["spectr"], settings, record=True, trace_every=5)
    traces = [step.trace for step in stream if step.trace is not None]
    num_prompt = traces[0].columns[0].num_prompt
    assert [t.columns[0].num_tokens - num_prompt for t in traces] == [5, 10, 12]
    assert np.isnan(traces[0].columns[0].kl).all()
    assert np.isfinite(traces[-1].columns[0].kl[1:]).all()
    early, late = traces[0].columns[0].experts, traces[-1].columns[0].experts
    assert np.array_equal(early[:-1], late[: len(early) - 1])


def test_an_end_token_finishes_a_column_and_not_the_others(routed_model: SpectrModel) -> None:
    free = trace_of(run(routed_model, ["base", "spectr"]))
    stop_at = int(free.column("spectr").token_ids[free.columns[0].num_prompt + 5])
    routed_model.model.generation_config.eos_token_id = [1, stop_at]
    step = run(routed_model, ["base", "spectr"])
    spectr, base = step.columns[1], step.columns[0]
    ids = trace_of(step).column("spectr").token_ids
    assert ids[-1] == stop_at
    assert (
        spectr.num_tokens <= 6 < base.num_tokens or stop_at in trace_of(step).columns[0].token_ids
    )
    alone = run(routed_model, ["spectr"])
    assert texts(alone)[0] == spectr.text
    assert np.array_equal(
        trace_of(alone).column("spectr").experts, trace_of(step).column("spectr").experts
    )


def test_closing_cancels_between_tokens_and_frees_the_run(routed_model: SpectrModel) -> None:
    settings = GenerationSettings(max_new_tokens=400)
    stream = routed_model.stream(PROMPT, ["spectr", "arrow"], settings, record=True)
    step = next(stream)
    plan = weakref.ref(stream.gi_frame.f_locals["self"].plan)  # type: ignore[attr-defined]
    threads = threading.active_count()
    stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: threading.active_count() == threads - 1)
    assert step.columns[0].num_tokens == 1
    del stream
    gc.collect()
    assert plan() is None
    assert run(routed_model, ["spectr"]).columns[0].num_tokens == 24


def test_an_error_in_the_model_reaches_the_reader_and_leaves_the_engine_usable(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: RoutingPlan, bank: ExpertBank, x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(RoutingPlan, "mix", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(routed_model, ["spectr"])
    assert run(routed_model, ["spectr"]).columns[0].num_tokens == 24


def test_sampling_follows_the_seed_and_temperature(routed_model: SpectrModel) -> None:
    def sample(**options: object) -> str:
        return texts(run(routed_model, ["spectr"], **options))[0]

    assert sample(temperature=1.0, seed=1) == sample(temperature=1.0, seed=1)
    assert sample(temperature=1.0, seed=1) != sample(temperature=1.0, seed=2)
    assert sample(temperature=1.0, seed=1) != sample(temperature=0.0)
    assert sample(temperature=1.0, seed=1, top_p=0.1) != sample(temperature=1.0, seed=1)


def test_sampling_draws_from_the_models_distribution() -> None:
    """The exponential race against the probabilities it should follow, 4,000 draws."""
    from spectr_demo.engine.sampling import SharedNoise

    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = SharedNoise(seed=0)
    drawn = torch.stack(
        [noise(torch.empty(1, 1), probs.log()[None])[0].argmax() for _ in range(4000)]
    )
    frequency = drawn.bincount(minlength=4) / 4000
    assert_close(frequency, probs, atol=0.03, rtol=0)


def test_a_base_without_experts_still_answers(build_model: BuildModel) -> None:
    step = run(build_model([]), ["base"])
    assert step.columns[0].num_tokens == 24
    assert trace_of(step).column("base").experts.shape[1:] == (0, 0, 0)
    with pytest.raises(ValueError, match="no expert to choose from"):
        run(build_model([]), ["spectr"])


def test_a_layer_that_flattens_the_batch_is_refused(routed_model: SpectrModel) -> None:
    layer = routed_model.model.model.layers[0].mlp.up_proj
    names = routed_model.library.names
    with (
        routed(RoutingPlan([parse_router("spectr", names)], names)),
        pytest.raises(ValueError, match=r"up_proj gets input of shape \(5, 64\)"),
    ):
        layer(torch.zeros(5, 64))


def test_detaching_gives_the_base_back(routed_model: SpectrModel) -> None:
    inputs = torch.tensor([routed_model.encode(PROMPT)])
    with torch.no_grad():
        attached = routed_model.model(inputs).logits
        routed_model.detach()
        assert not any(isinstance(m, RoutedLinear) for m in routed_model.model.modules())
        assert torch.equal(routed_model.model(inputs).logits, attached)


def test_columns_with_one_router_have_labels_of_their_own(routed_model: SpectrModel) -> None:
    columns = ["spectr", RouterConfig(name="spectr", top_k=2), "single:red", "spectr"]
    labels = [column.label for column in run(routed_model, columns).columns]
    assert labels == ["spectr", "spectr (2)", "single:red", "spectr (3)"]


@pytest.mark.parametrize(
    ("prompt", "columns", "message"),
    [
        ("", ["spectr"], "the prompt is empty"),
        (" \n", ["spectr"], "the prompt is empty"),
        ("x" * 600, ["spectr"], "the context of tiny is 512"),
        ("hello", [], "no column to run"),
        ("hello", ["spectr", "single:rde"], "unknown expert 'rde'.*Did you mean 'red'"),
        ("hello", [RouterConfig(name="spectr", top_k=4)], "only 3 experts"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    routed_model: SpectrModel, prompt: str, columns: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        routed_model.stream(prompt, columns)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}, {"seed": -1}],
)
def test_settings_check_themselves(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it must be"):
        GenerationSettings(**wrong)  # type: ignore[arg-type]


def test_chat_messages_and_plain_text(routed_model: SpectrModel) -> None:
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3+3?"},
    ]
    tokenizer = routed_model.tokenizer
    text = tokenizer.decode(routed_model.encode(messages))
    assert text.count("<|im_start|>") == 4
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        assert tokenizer.decode(routed_model.encode("2+2?")) == "2+2?"
    finally:
        tokenizer.chat_template = template


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    top_k=st.integers(1, 5),
    router=st.sampled_from([key for key, row in ROUTERS.items() if row.score]),
    composition=st.sampled_from(["parameters", "outputs"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 5),
)
def test_delta_is_the_equation(
    ranks: list[int],
    shape: tuple[int, int],
    top_k: int,
    router: str,
    composition: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """The fused product against `(sum w B*)(sum w A*) x` and `sum w B* A* x`, written out."""
    from spectr_demo.routing.spectr import align

    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    D_in, D_outs = 16, (12, 5)
    aligned = {
        e: [align(randn(r, D_in), randn(D_out, r), 1.0) for D_out in D_outs]
        for e, r in enumerate(ranks)
    }
    paths = ("layers.0.q_proj", "layers.0.k_proj")
    device = torch.device("cpu")
    bank = ExpertBank.from_aligned(paths, aligned, device=device, dtype=torch.float32)
    names = [f"e{e}" for e in aligned]
    config = RouterConfig(
        name=router,
        top_k=min(top_k, len(ranks)),
        weighting="softmax",
        composition=composition,  # type: ignore[arg-type]
    )
    R, T = shape
    x = randn(R, T, D_in).to(dtype)
    plan = RoutingPlan([config] * R, names)
    all_weights = plan.weights(bank, bank.project(x))  # (R, T, P, E)
    r = max(ranks)
    for p, D_out in enumerate(D_outs):
        y = randn(R, T, D_out).to(dtype)
        routed_y = plan.add(y.clone(), bank, p, x)
        assert routed_y.dtype == dtype
        weights, layer = all_weights[:, :, p], [expert[p] for expert in aligned.values()]
        A = torch.stack([torch.nn.functional.pad(a.A, (0, 0, 0, r - len(a.A))) for a in layer])
        B = torch.stack([torch.nn.functional.pad(a.B, (0, r - a.B.shape[1])) for a in layer])
        if composition == "parameters":
            merged_A = torch.einsum("rte,ekd->rtkd", weights, A)
            merged_B = torch.einsum("rte,eok->rtok", weights, B)
            expected = torch.einsum("rtok,rtkd,rtd->rto", merged_B, merged_A, x.float())
        else:
            expected = torch.einsum("rte,eok,ekd,rtd->rto", weights, B, A, x.float())
        expected = y.float() + expected
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        scale = float(expected.abs().max()) + 1
        assert_close(routed_y.float(), expected, atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize(
    "router",
    [
        *("lag", "spectr", "spectr-paper", "arrow", "norm"),
        RouterConfig(name="lag", top_k=3, weighting="softmax", composition="parameters"),
        RouterConfig(name="lag", prefilter=39),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_the_chosen_give_what_all_experts_give(
    router: str | RouterConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way for many experts and the way for few, on the same tokens."""
    from spectr_demo.routing.spectr import align

    generator = torch.Generator().manual_seed(0)
    num_experts, num_tokens, D_outs = 40, 45, (24, 8)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    aligned = {
        e: [align(randn(4, 16), randn(D_out, 4), 1.0) for D_out in D_outs]
        for e in range(num_experts)
    }
    paths = ("layers.0.q_proj", "layers.0.k_proj")
    device = torch.device("cpu")
    bank = ExpertBank.from_aligned(paths, aligned, device=device, dtype=dtype)
    names = [f"e{e}" for e in aligned]
    config = parse_router(router, names)
    x = randn(3, num_tokens, 16)

    def read(is_copied: bool) -> tuple[list[Tensor], Recorder]:
        monkeypatch.setattr(
            ExpertBank, "copying_pays", lambda bank, num, _: is_copied and num < num_experts
        )
        recorder = Recorder()
        plan = RoutingPlan([config] * 3, names, recorder)
        return [
            plan.add(torch.zeros(3, num_tokens, D), bank, p, x) for p, D in enumerate(D_outs)
        ], recorder

    (stacked, of_stacked), (copied, of_copied) = read(is_copied=False), read(is_copied=True)
    if dtype == torch.bfloat16:  # near ties fall the other way: most choices are the same
        (first, *_), (second, *_) = of_stacked.choices(bank, 0), of_copied.choices(bank, 0)
        assert (first[..., 0] == second[..., 0]).float().mean() > 0.9
        return
    for expected, found in zip(stacked, copied, strict=True):
        assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for expected, found in zip(
        of_stacked.choices(bank, 0), of_copied.choices(bank, 0), strict=True
    ):
        assert_close(found, expected)


@pytest.mark.parametrize(
    ("free", "dtype", "is_mapped"),
    [(1 << 40, torch.float32, False), (100_000, torch.bfloat16, False), (1, torch.bfloat16, True)],
)
def test_a_library_takes_what_memory_there_is(
    free: int,
    dtype: torch.dtype,
    is_mapped: bool,
    build_model: BuildModel,
    expert_folders: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In 32 bits, in 16 or mapped from disk: the same experts, and nearly the same answers."""
    expected = build_model(expert_folders)
    monkeypatch.setattr(experts, "available_memory", lambda: free)
    model = build_model(expert_folders)
    bank = model.library.banks[0]
    assert bank.A.dtype == dtype
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert ("/banks/" in maps.read_text()) == is_mapped
    for expert, other in zip(model.library.aligned, expected.library.aligned, strict=True):
        for path, layer in expert.items():
            assert layer.A.dtype == torch.float32
            assert_close(layer, other[path], atol=1e-2, rtol=1e-2)
    ids = torch.tensor([model.encode("Hello")])
    for column in ("uniform", "single:red", "spectr", "lag", "spectr-context"):
        logits = []
        for one in (model, expected):
            plan = one.plan([parse_router(column, one.library.names)], ids.tolist())
            with torch.inference_mode(), routed(plan):
                logits.append(one.model(ids).logits)
        assert logits[0].isfinite().all()
        if column in ("uniform", "single:red"):  # random experts are near ties for a router
            assert_close(*logits, atol=0.05 * float(logits[1].abs().max()), rtol=0)


@pytest.mark.parametrize("columns", [["single:green"], ["single:red", "base", "single:blue"]])
def test_constant_rows_compute_with_their_own_experts_only(
    columns: list[str], routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scored row beside them makes the layers compute with all experts; the answers stay."""
    sizes, mix = set(), RoutingPlan.mix

    def spy(self: RoutingPlan, bank: ExpertBank, x: Tensor) -> Tensor:
        sizes.add(len(bank.expert_ids))
        return mix(self, bank, x)

    monkeypatch.setattr(RoutingPlan, "mix", spy)
    alone = texts(run(routed_model, columns))
    assert sizes == {sum(column != "base" for column in columns)}
    assert texts(run(routed_model, [*columns, "spectr"]))[:-1] == alone
    assert sizes == {sum(column != "base" for column in columns), 3}


def _ids(column: ColumnTrace) -> Tensor:
    return torch.from_numpy(column.token_ids).long()


def _plan(model: SpectrModel, column: ColumnTrace) -> RoutingPlan:
    router = parse_router(RouterConfig(**column.router), model.library.names)
    ids = column.token_ids[: column.num_prompt].tolist()
    return model.plan([router], [ids])


def _forward(model: SpectrModel, column: ColumnTrace, plan: RoutingPlan | None) -> Tensor:
    """(T - 1, V) logits of one pass over the column's tokens without a cache, last one left out."""
    with torch.no_grad(), routed(plan):
        return model.model(_ids(column)[None, :-1], use_cache=False).logits[0]


class _Replay(RoutingPlan):
    """Weights read from a trace instead of computed from scores."""

    def __init__(self, model: SpectrModel, trace: RoutingTrace, column: ColumnTrace) -> None:
        names = model.library.names
        router = parse_router(RouterConfig(**column.router), names)
        if ROUTERS[router.name].reads_request:
            router = parse_router("uniform", names)
        super().__init__([router], names, calibration=model.calibration)
        self.library, self.trace, self.column = model.library, trace, column

    def weights(self, bank: ExpertBank, z: Tensor) -> Tensor:
        place = np.s_[:-1, *self.library.places(bank)]
        experts, weights = self.column.experts[place], self.column.weights[place]
        dense = np.zeros((*experts.shape[:2], self.trace.num_experts + 1), np.float32)
        np.put_along_axis(dense, experts.astype(np.int64), weights, axis=-1)  # -1: the spare place
        return torch.from_numpy(dense[None, ..., bank.expert_ids.numpy()])


def test_the_base_answers_alone_where_no_expert_stands_out(routed_model: SpectrModel) -> None:
    ordinary = routed_model.reader.ordinary
    unsure = parse_router(replace(IN_CONTEXT, confidence=0.5), routed_model.library.names)
    for least, label in ((9.0, "base"), (-9.0, "spectr-context")):
        known = replace(ordinary, certainty=torch.tensor([least]))
        routed_model.reader._ordinary = known
        step = run(routed_model, ["base", IN_CONTEXT, unsure])
        expected = {"base": 0, "spectr-context": 1}[label]
        assert texts(step)[2] == texts(step)[expected]
        is_routed = trace_of(step).columns[2].experts[:-1] != NOT_ROUTED
        assert is_routed.all() if expected else not is_routed.any()


def test_a_router_that_reads_the_request_needs_what_comes_of_it(
    routed_model: SpectrModel,
) -> None:
    router = parse_router(IN_CONTEXT, routed_model.library.names)
    with pytest.raises(ValueError, match="needs the weights that come of it"):
        RoutingPlan([router], routed_model.library.names, calibration=routed_model.calibration)


def test_a_calibrated_router_needs_a_calibration(routed_model: SpectrModel) -> None:
    router = parse_router("spectr-calibrated", routed_model.library.names)
    with pytest.raises(ValueError, match="needs a calibration"):
        RoutingPlan([router], routed_model.library.names)

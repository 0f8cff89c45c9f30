"""The tables of docs/performance.md, from `benchmarks/results/*.json`. `tables.py` writes them."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

CASES = (
    "torch's layers",
    "PEFT, one adapter",
    "PEFT Arrow",
    "base",
    "single",
    "uniform",
    "arrow",
    "spectr",
    "spectr-paper",
    "spectr-context",
    "lag",
)
# The machines of docs/performance.md, and how the names of their JSON files end.
MACHINES = {"amx": "", "avx512_bf16": "_bfloat16", "avx2": "_float32"}

# The parts of a later start; older files lack some.
STARTUP = {
    "page_s": "later start, to the page",
    "import_s": "imports in it",
    "answer_s": "later start, from the process to the first token of an answer",
    "load_s": "the base in it",
    "base_s": "the base in it",
    "experts_s": "the experts in it",
    "calibrate_s": "the calibration in it",
    "token_s": "the prompt in it",
}

Row = Mapping[str, Any]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows_of(benchmark: str, machine: str) -> list[Row]:
    """Its figures on this machine; empty where it was not run there."""
    path = RESULTS / f"{benchmark}{MACHINES[machine]}.json"
    if not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    rows: list[Row] = document["results"] if isinstance(document, dict) else document
    return rows


def find(rows: Iterable[Row], /, **facts: object) -> Row | None:
    """The row with these facts, or None."""
    matching = (row for row in rows if all(row.get(k) == value for k, value in facts.items()))
    return next(matching, None)


# --- one machine ------------------------------------------------------------------------------


def speed_table(machine: str) -> str:
    """Speeds relative to the bare base, one line for each setting of each benchmark."""
    lines: list[tuple[str, list[Row]]] = []
    decode = rows_of("decode", machine)
    lines += [(f"a token, {n} experts", _those(decode, experts=n)) for n in (8, 32)]
    lengths = rows_of("sequence_length", machine)
    for n in dict.fromkeys(row["prompt"] for row in lengths):
        lines.append((f"a token after {n:,}, 8 experts", _those(lengths, prompt=n)))
    ranks = rows_of("rank", machine)
    for r in dict.fromkeys(row["rank"] for row in ranks):
        lines.append((f"a token, 8 experts of rank {r}", _those(ranks, rank=r)))
    for row in rows_of("number_of_experts", machine):
        cases = ("spectr", "spectr-paper", "lag")
        found: list[Row] = [{"case": case, "ratio": row[case]} for case in cases]
        lines.append((f"a token, library of {row['experts']:,}", found))
    mixed = rows_of("mixed_adapters", machine)
    if mixed:
        renamed: list[Row] = [
            {**row, "case": row["case"].replace("PEFT", "PEFT, one adapter")} for row in mixed
        ]
        lines.append(("a token of 4 rows, an adapter each", renamed))
    prefill = rows_of("prefill", machine)
    for n in dict.fromkeys(row["tokens"] for row in prefill):
        lines.append((f"a prompt of {n:,} tokens, 8 experts", _those(prefill, tokens=n)))
    return markdown(["setting", "bare base", *CASES], [_speed_line(*line) for line in lines])


def _those(rows: Iterable[Row], /, **facts: object) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in facts.items())]


def _speed_line(setting: str, rows: Sequence[Row]) -> list[str]:
    base = find(rows, case="bare base")
    seconds = base and base.get("seconds_per_token", base.get("seconds"))
    found = [find(rows, case=case) for case in CASES]
    return [
        setting,
        f"{1000 * seconds:.0f} ms" if seconds else "",
        *(f"{row['ratio']:.2f}" if row else "" for row in found),
    ]


def costs_table(machine: str) -> str:
    """Times and memory of everything else."""
    rows = [*_columns_lines(machine), *_alignment_lines(machine)]
    for row in rows_of("number_of_experts", machine):
        memory = f"{row['memory_MB']:,.0f} MB, {row['of_files']:.2f} of the files"
        loaded = f"{memory}; loaded in {row['load_s']:.2g} s"
        rows.append([f"library of {row['experts']:,}", loaded])
    first, *later = rows_of("startup", machine)
    rows.append(["first start, to the page", f"{first['page_s']:.0f} s"])
    for key, name in STARTUP.items():
        if key in first:
            rows.append([name, f"{median(row[key] for row in later):.1f} s"])
    return markdown(["what", "measured"], rows)


def _columns_lines(machine: str) -> list[list[str]]:
    rows, lines = rows_of("columns", machine), []
    for n in dict.fromkeys(row["tokens"] for row in rows):
        apart, batch, plain, recorded = _those(rows, tokens=n)
        seconds = f"{batch['seconds']:.1f} s, one after another {apart['seconds']:.1f} s"
        lines.append(
            [f"four columns of {n} tokens in one batch", f"{seconds}: {1 / batch['ratio']:.3f}"]
        )
        seconds = f"{recorded['seconds']:.1f} s, not recorded {plain['seconds']:.1f} s"
        lines.append(
            [f"one column of {n} tokens, recorded", f"{seconds}: speed {recorded['ratio']:.2f}"]
        )
    return lines


def _alignment_lines(machine: str) -> list[list[str]]:
    rows, lines = rows_of("alignment", machine), []
    for rank in dict.fromkeys(row["rank"] for row in rows):
        ms = {row["case"]: f"{1000 * row['seconds']:.1f}" for row in _those(rows, rank=rank)}
        ratio = 1 / _row(rows, case="align", rank=rank)["ratio"]
        text = (
            f"{ms['align']} ms, {ratio:.1f} times reading the file ({ms['read']} ms); "
            f"reading and checking {ms['read and check']} ms; with writing the cache "
            f"{ms['align and cache']} ms; from the cache {ms['from the cache']} ms"
        )
        lines.append([f"aligning an adapter of rank {rank}", text])
    return lines


PACKED_HELD = ("open", "single", "lag", "spectr-context", "spectr")
PACKED_SPEED = ("spectr-context", "lag", "spectr")


def _first(row: Row) -> str:
    """What half of the requests and 99 of 100 wait for."""
    return f"{row['first_p50_s']:.2g} s, {row['first_p99_s']:.2g} s"


def batching_table() -> str:
    rows = [
        [
            row["case"],
            row["way"],
            f"{row['requests_per_s']:.2g}",
            f"{row['tokens_per_s']:.3g}",
            _first(row),
            f"{row['same']:.0%}",
        ]
        for row in rows_of("batching", "amx")
    ]
    first = "first token, half of them and 99 of 100"
    header = ["four visitors", "their runs", "requests a second", "tokens a second", first, "same"]
    return markdown(header, rows)


def load_table() -> str:
    rows = [
        [
            f"`{row['door']}`",
            str(row["clients"]),
            f"{row['requests_per_s']:.2g}",
            f"{row['tokens_per_s']:.2g}",
            _first(row),
            f"{row['answer_p50_s']:.2g} s",
        ]
        for row in rows_of("load", "amx")
    ]
    first = "first text, half of them and 99 of 100"
    header = ["door", "clients", "requests a second", "tokens a second", first, "whole answer"]
    return markdown(header, rows)


def packed_table() -> str:
    """Libraries on disk: opening, memory after each kind of run, and speed."""
    lines = []
    for row in rows_of("packed", "amx"):
        held = [f"{row[f'{case}_MB']:,.0f}" if f"{case}_MB" in row else "" for case in PACKED_HELD]
        speed = [f"{row[router]:.2f}" if router in row else "" for router in PACKED_SPEED]
        read = [
            f"{row[key]:.2f} s" if key in row else "" for key in ("first_request_s", "request_s")
        ]
        sizes = [f"{row['experts']:,}", f"{row['GB']:.2f} GB", f"{row['open_s']:.1f} s"]
        lines.append([row["shape"], *sizes, *held, *read, *speed])
    header = ["shape", "experts", "on disk", "opened in", "MB once open"]
    header += [f"MB after `{case}`" for case in PACKED_HELD[1:]]
    header += ["first request", "a request", *(f"speed of `{router}`" for router in PACKED_SPEED)]
    return markdown(header, lines)


# --- a GPU ------------------------------------------------------------------------------------

GPU_CASES = (
    *("bare base", "single:e0", "uniform", "spectr", "spectr-paper", "arrow", "norm", "lag"),
    *("spectr-context", "PEFT Arrow"),
)


def _gpu_rows(benchmark: str) -> list[Row]:
    rows: list[Row] = json.loads((RESULTS / f"{benchmark}.json").read_text("utf-8"))["results"]
    return rows


def gpu_table() -> str:
    """Tokens a second of each row, and the ratio to the bare base: one line for each batch."""
    rows = [row for row in _gpu_rows("gpu") if row["case"] != "memory" and not row["recorded"]]
    lines = []
    for shape, num_experts, num_rows, mode in dict.fromkeys(
        (row["shape"], row["experts"], row["rows"], row["mode"]) for row in rows
    ):
        facts = {"shape": shape, "experts": num_experts, "rows": num_rows}
        of_batch = _those(rows, **facts, mode=mode)
        speeds = []
        for case in GPU_CASES:
            row = find(of_batch, case=case)
            known = row is not None and "ratio" in row
            speeds.append(f"{row['tokens_per_second']:.0f} ({row['ratio']:.2f})" if known else "")
        if any(speeds[1:]):
            lines.append([shape, f"{num_experts:,}", str(num_rows), mode, *speeds])
    return markdown(["shape", "experts", "rows", "mode", *GPU_CASES], lines)


def launches_table() -> str:
    """Of one row that is not recorded."""
    rows = _those(_gpu_rows("launches"), rows=1, recorded=False)
    base = rows[0]
    lines = [["bare base", f"{base['token, base']:,}", "1.00", f"{base['prompt, base']:,}", "1.00"]]
    for row in rows:
        cells = [[f"{row[w]:,}", f"{row[f'{w}, times']:.2f}"] for w in ("token", "prompt")]
        lines.append([f"`{row['router']}`", *cells[0], *cells[1]])
    return markdown(["router", "one token", "of the base", "a prompt", "of the base"], lines)


def copies_table() -> str:
    """Microseconds of one layer for one row: a product with all experts / copies of the chosen."""
    rows = _those(_gpu_rows("copies"), rows=1)
    numbers = list(dict.fromkeys(row["experts"] for row in rows))
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        found = [_row(rows, case=case, experts=n) for n in numbers]
        times = [f"{row['all_us']:.0f} / {row['copies_us']:.0f}" for row in found]
        lines.append([f"`{case}`", *times])
    return markdown(["router", *(f"{n:,} experts" for n in numbers)], lines)


# --- the aims ---------------------------------------------------------------------------------

# Each: what is measured, the aim, whether more is better, and the values on one machine.
Values = Callable[[str], list[float]]


def _row(rows: Iterable[Row], /, **facts: object) -> Row:
    row = find(rows, **facts)
    if row is None:
        raise KeyError(f"no row with {facts}")
    return row


def _against(baseline: str, *cases: str, benchmark: str = "decode", **facts: int) -> Values:
    """The speed of these cases relative to the baseline, both measured against the bare base."""

    def values(machine: str) -> list[float]:
        rows = rows_of(benchmark, machine)
        slow = _row(rows, case=baseline, **facts)["ratio"]
        return [_row(rows, case=case, **facts)["ratio"] / slow for case in cases]

    return values


def _many(key: str) -> Values:
    def values(machine: str) -> list[float]:
        row = find(rows_of("number_of_experts", machine), experts=1000)
        return [row[key]] if row else []

    return values


SPECTR = ("spectr", "spectr-paper")
AIMS: tuple[tuple[str, float, bool, Values], ...] = (
    (
        "`spectr`, `spectr-paper` with 8 experts / bare base",
        0.8,
        True,
        _against("bare base", *SPECTR, experts=8),
    ),
    ("the same / PEFT Arrow", 2.2, True, _against("PEFT Arrow", *SPECTR, experts=8)),
    (
        "the same with 32 experts / PEFT Arrow",
        5,
        True,
        _against("PEFT Arrow", *SPECTR, experts=32),
    ),
    (
        "`single` of 8 experts / PEFT, one adapter",
        1.1,
        True,
        _against("PEFT, one adapter", "single", experts=8),
    ),
    ("LAG with 1,000 experts / bare base", 0.5, True, _many("lag")),
    ("memory of 1,000 experts / their files", 1.2, False, _many("of_files")),
    (
        "`spectr`, `spectr-paper`, prompt of 1,000 tokens / bare base",
        0.6,
        True,
        _against("bare base", *SPECTR, benchmark="prefill", tokens=1000),
    ),
    (
        "time of aligning rank 8 / reading",
        3,
        False,
        lambda m: [1 / v for v in _against("read", "align", benchmark="alignment", rank=8)(m)],
    ),
    (
        "time of four columns in one batch / one after another",
        0.35,
        False,
        lambda m: [
            1 / v
            for v in _against("one after another", "one batch", benchmark="columns", tokens=128)(m)
        ],
    ),
    (
        "recorded run / not recorded",
        0.9,
        True,
        _against("not recorded", "recorded", benchmark="columns", tokens=128),
    ),
)


def aims_table() -> str:
    rows = []
    for what, aim, is_more_better, values_on in AIMS:
        cells = []
        for machine in MACHINES:
            values = values_on(machine)
            is_met = all(v >= aim if is_more_better else v <= aim for v in values)
            text = ", ".join(f"{value:.3g}" for value in values)
            cells.append(text if is_met else f"**{text}**")
        rows.append([what, f"{'at least' if is_more_better else 'at most'} {aim:g}", *cells])
    return markdown(["speed, unless said otherwise", "aim", *MACHINES], rows)


TABLES: dict[str, Callable[[], str]] = {
    "aims": aims_table,
    "gpu": gpu_table,
    "launches": launches_table,
    "copies": copies_table,
    "packed": packed_table,
    "batching": batching_table,
    "load": load_table,
    **{f"speed {machine}": partial(speed_table, machine) for machine in MACHINES},
    **{f"costs {machine}": partial(costs_table, machine) for machine in MACHINES},
}

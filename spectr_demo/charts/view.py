"""The routing view: one column of a run, its tokens across and its layers up, as HTML.

Its pictures are SVG without a size of their own, in the colours of the page, so they follow any
width and theme. All can be read without a script; `view.js` adds what a pointer and keys do.
"""

import html
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spectr_demo.charts.colors import GREY, Groups, groups_of
from spectr_demo.charts.text import counted, num_cells, shorten, visible
from spectr_demo.trace import NOT_ROUTED, BestScores, ColumnTrace, DominantExperts, RoutingTrace

CSS = Path(__file__).with_name("view.css")
SCRIPT = Path(__file__).with_name("view.js")
NO_EXPERT = "no expert"

_MOST_DRAWN = 512  # tokens of a request or an answer: more take a browser seconds
_NUM_BEST = 5
# How strongly a cell is painted, in percent, by quarter of its lead or weight.
_STRENGTHS = (35, 55, 78, 100)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --ink: #1f2328; --muted: #5a6372; --line: #e3e6eb;
  --card: #fff; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e8eb; --muted: #a3acba; --line: #262c37;
  --card: #161a22; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--card);
  max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
h2 {{ margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }}
</style></head><body><h1>Which expert served which token</h1><pre>{title}</pre>
{body}</body></html>
"""


@dataclass(frozen=True)
class RoutingView:
    """What `routing_view` drew; a notebook shows it. html: without style and script."""

    html: str

    def _repr_html_(self) -> str:
        """With its style and script, as a page of its own needs them."""
        style, script = (path.read_text(encoding="utf-8") for path in (CSS, SCRIPT))
        return f"<style>{style}</style>{self.html}<script>{script}</script>"

    def write_html(self, path: str | Path) -> None:
        """One file that needs no network."""
        page = _PAGE.format(title="Routing", body=self._repr_html_())
        Path(path).write_text(page, encoding="utf-8")


def routing_page(trace: RoutingTrace, title: str, above: str = "") -> str:
    """The views of all columns, as one page that needs no network. above: HTML before them."""
    views = [routing_view(trace, label) for label in trace.labels]
    parts = [
        f"<h2>{html.escape(label)}</h2><div>{view.html}</div>"
        for label, view in zip(trace.labels, views[:-1], strict=False)
    ]
    parts += [f"<h2>{html.escape(trace.labels[-1])}</h2>{views[-1]._repr_html_()}"]
    return _PAGE.format(title=html.escape(title), body="\n".join([above, *parts]))


def routing_view(trace: RoutingTrace, label: str) -> RoutingView:
    """Which expert served which token of a column, in which layer, and what spoke for it.

    For each token: the experts that were used; in each layer the expert that the scores put first,
    and the one that was used; how far the next-token distribution is from the base's. For a router
    that reads requests the scores are the evidence of its reading, the same over a lane. The list
    beside it has the five best experts of the whole answer, or of a token that is pointed at.
    """
    column = trace.column(label)
    seen = _Seen(trace, column, groups_of(trace))
    answer = range(column.num_tokens)[column.part_slice("answer")]
    blocks = [_block(seen, answer[:_MOST_DRAWN])] if answer else []
    if len(answer) > _MOST_DRAWN:
        blocks.append(f"<p>The first {_MOST_DRAWN} of {len(answer)} tokens are drawn.</p>")
    run = zlib.crc32("".join(column.tokens[: column.num_prompt]).encode("utf-8", "replace"))
    content = (
        f"<h3>{_finding(seen)}</h3><p>{_summary(seen)}</p>{_legend(seen)}"
        f'<div class="rv-both"><div class="rv-plot" tabindex="0" role="application" '
        'aria-label="Routing of the answer. Left and right arrow: token. Up and down: layer. '
        f'Enter: pin.">{"".join(blocks)}</div>'
        f'<aside class="rv-told" aria-live="polite">{_told_of_all(seen)}</aside></div>'
        f"{_prompt(seen)}{_table(seen)}"
    )
    return RoutingView(
        f'<section class="rv" data-column="{html.escape(label)}" data-run="{run}" '
        f'data-drawn="{zlib.crc32(content.encode("utf-8", "replace"))}" '
        f'data-first="{column.num_prompt}" '
        f'data-names="{html.escape(json.dumps(trace.expert_names))}">{content}</section>'
    )


@dataclass(frozen=True)
class _Seen:
    """A column and its statistics, each computed when it is first needed."""

    trace: RoutingTrace
    column: ColumnTrace
    groups: Groups

    @cached_property
    def share(self) -> NDArray[np.float32]:
        """(T, E)."""
        return self.trace.token_share(self.column.label)

    @cached_property
    def scores(self) -> NDArray[np.float32]:
        """(T, E), NaN where there is none."""
        return self.trace.token_scores(self.column.label)

    @cached_property
    def used(self) -> DominantExperts:
        return self.trace.dominant_cells(self.column.label)

    @cached_property
    def best(self) -> BestScores | None:
        return self.trace.best_scores(self.column.label)

    @cached_property
    def is_read(self) -> NDArray[np.bool_]:
        return self.trace.is_token_read(self.column.label)

    @cached_property
    def of_answer(self) -> NDArray[np.float32]:
        """(E,) shares over the answer; what is missing to 1 is the base's."""
        return self.trace.share(self.column.label, "answer")

    @cached_property
    def others(self) -> list[tuple[ColumnTrace, int]]:
        """The columns whose likeliest tokens are known, this one first, and how many of their first
        tokens are those of this one: they read the same text up to there."""
        found = []
        for other in sorted(self.trace.columns, key=lambda each: each is not self.column):
            if other.candidates is not None:
                num = min(other.num_tokens, self.column.num_tokens)
                is_other = other.token_ids[:num] != self.column.token_ids[:num]
                found.append((other, int(is_other.argmax()) if is_other.any() else num))
        return found

    @property
    def lanes(self) -> list[range]:
        """The prompt's tokens, of each request by itself where they were read so."""
        prompt = range(self.column.num_prompt)
        if self.column.reading is None:
            return [prompt] if prompt else []
        lanes = self.column.reading.lanes[: len(prompt)]
        found = [np.flatnonzero(lanes == lane) for lane in range(int(lanes.max(initial=-1)) + 1)]
        return [range(int(each[0]), int(each[-1]) + 1) for each in found if len(each)]


# In words


def _finding(seen: _Seen) -> str:
    """What this column did, in a sentence."""
    column, share = seen.column, seen.of_answer
    names = seen.trace.expert_names
    if column.num_prompt == column.num_tokens:
        return "Nothing is answered yet"
    if column.reading is not None:
        return _finding_of_lanes(seen)
    if not share.any():
        return "The base answered alone: no expert was used"
    first = int(share.argmax())
    if share[first] > 1 - 1e-5:
        return f"<b>{html.escape(names[first])}</b> served every token"
    if seen.best is None:
        return f"All {counted(len(names), 'expert')} served every token alike"
    where = seen.is_read & (np.arange(column.num_tokens) >= column.num_prompt)
    used = (seen.share[where] > 0).sum(axis=1).mean() if where.any() else 0
    return (
        f"This router used <b>{html.escape(names[first])}</b> most, {share[first]:.0%} of the "
        f"answer, and {used:.0f} of {counted(len(names), 'expert')} at a typical token"
    )


def _finding_of_lanes(seen: _Seen) -> str:
    """Such as "this router used sql for line 1 and cron for line 2"."""
    column = seen.column
    assert column.reading is not None
    lanes = column.reading.lanes[column.num_prompt :]
    share, is_read = seen.share[column.num_prompt :], seen.is_read[column.num_prompt :]
    names = np.array(seen.trace.expert_names)
    who = []
    for lane in range(int(lanes.max()) + 1):
        # One set of experts, but where an intervention begins in the middle.
        sets = dict.fromkeys(tuple(names[row > 0]) for row in share[(lanes == lane) & is_read])
        told = [" and ".join(f"<b>{html.escape(name)}</b>" for name in used) for used in sets]
        who.append(", then ".join(used or "the base" for used in told) if any(told) else "")
    if not any(who):
        return "This router left the answer to the base: no expert stands out"
    if len(who) == 1:
        return f"This router used {who[0]} for the whole answer"
    parts = [f"{used or 'the base'} for line {line}" for line, used in enumerate(who, start=1)]
    return f"This router used {', '.join(parts[:-1])} and {parts[-1]}"


def _summary(seen: _Seen) -> str:
    """How long the answer is, and how much its layers agree."""
    num = seen.column.num_tokens - seen.column.num_prompt
    text = f"{counted(num, 'answer token')}."
    if seen.best is None or not num:
        return text
    leaders = seen.best.expert[seen.column.num_prompt :]
    counts = [len(np.unique(row[row != NOT_ROUTED])) for row in leaders]
    typical = round(float(np.median([n for n in counts if n] or [0])))
    what = "the evidence" if seen.column.reading is not None else "their scores"
    num_layers = counted(seen.trace.num_layers, "layer")
    whom = "the same expert" if typical == 1 else f"{typical} different experts"
    return f"{text} By {what}, the {num_layers} of a typical token are for {whom}."


def _shares(seen: _Seen) -> list[tuple[str, str, float]]:
    """Name, colour and share of all that served the answer, the largest first."""
    groups, share = seen.groups, seen.groups.reduce(seen.of_answer)
    found = [*zip(groups.names, groups.colors, share.tolist(), strict=True)]
    if seen.is_read[seen.column.num_prompt :].any():
        found.append((f"base, {NO_EXPERT}", "", 1 - float(share.sum())))
    return sorted((each for each in found if each[2] > 5e-4), key=lambda each: -each[2])


def _legend(seen: _Seen) -> str:
    """The colours, each with its share."""
    entries = [
        f"<li{_swatch(color)}{_names(seen, name)}>{html.escape(name)} <b>{share:.0%}</b></li>"
        for name, color, share in _shares(seen)
    ]
    if seen.used.is_tied[seen.column.num_prompt :].any():
        entries.append(f"<li{_swatch(GREY)}>all alike</li>")
    return f'<ul class="rv-legend" aria-label="Shares of the answer">{"".join(entries)}</ul>'


def _names(seen: _Seen, name: str) -> str:
    """The attribute by which a page knows which expert an entry is of."""
    return f' data-expert="{html.escape(name)}"' if name in seen.trace.expert_names else ""


def _swatch(color: str) -> str:
    """The attribute that gives a list's entry its colour, or hatches it."""
    return f' style="--c:{color}"' if color else ' class="rv-base"'


# As pictures


def _prompt(seen: _Seen) -> str:
    """The prompt, folded; a lane for each request."""
    lanes = seen.lanes
    if not lanes:
        return ""
    num = counted(seen.column.num_prompt, "token")
    requests = f" in {counted(len(lanes), 'lane')}" if seen.column.reading is not None else ""
    parts = []
    for number, lane in enumerate(lanes, start=1):
        drawn = lane[-_MOST_DRAWN:]
        if seen.column.reading is not None:
            used = np.array(seen.trace.expert_names)[seen.share[lane[-1]] > 0]
            whom = " and ".join(map(html.escape, used)) or "the base"
            cut = f", its last {_MOST_DRAWN} tokens" if len(drawn) < len(lane) else ""
            parts.append(f"<h4>Request {number}, for {whom}{cut}</h4>")
        elif len(drawn) < len(lane):
            parts.append(f"<h4>The last {_MOST_DRAWN} tokens</h4>")
        parts.append(_block(seen, drawn))
    return (
        f'<details class="rv-prompt"><summary>The prompt: {num}{requests}</summary>'
        f"{''.join(parts)}</details>"
    )


def _block(seen: _Seen, tokens: range) -> str:
    """Some tokens across: their text, what was used, the layers, the distance from the base."""
    where = slice(tokens.start, tokens.stop)
    column, groups, num = seen.column, seen.groups, len(tokens)
    labels = [_label(column.tokens[t]) for t in tokens]
    texts = "".join(f"<span>{html.escape(label)}</span>" for label in labels)
    rows = [f'<div class="rv-tokens">{texts}</div>', _caption("Used, over all layers")]
    ribbon = _ribbon(groups.reduce(seen.share[where]), groups) + _blanks(seen, tokens, 1000)
    rows.append(_svg("rv-ribbon", num, 1000, ribbon))
    if seen.best is not None:
        what = (
            "Evidence of each layer" if column.reading is not None else "Best score in each layer"
        )
        rows.append(_caption(f"{what}: the stronger, the clearer its lead{_layers(seen)}"))
        is_tied = np.zeros((num, seen.trace.num_layers), np.bool_)
        rows.append(_map(seen, "best", tokens, seen.best.expert, seen.best.lead, is_tied))
    if seen.best is not None and column.reading is None and column.experts.shape[-1] > 1:
        # With one expert at a place, or the same in all layers, it is told above.
        used = seen.used
        rows.append(_caption(f"Most used in each layer: the stronger, the more{_layers(seen)}"))
        rows.append(_map(seen, "used", tokens, used.expert, used.weight, used.is_tied[where]))
    rows.append(_distance(column.kl[where]))
    return (
        f'<div class="rv-scroll"><div class="rv-block" data-start="{tokens.start}" '
        f'style="--n:{num};--chars:{max(map(num_cells, labels))}">{"".join(rows)}'
        '<i class="rv-mark" hidden></i></div></div>'
    )


def _layers(seen: _Seen) -> str:
    num = seen.trace.num_layers
    return f"; 0 below, {num - 1} on top" if num > 1 else ""


def _distance(kl: NDArray[np.float32]) -> str:
    """Bars (T,), and the largest in words."""
    known = kl[np.isfinite(kl)]
    told = f"up to {known.max():.2g} nats" if known.size else "measured at the end"
    heights = np.nan_to_num(kl / max(float(known.max(initial=0)), 1e-9) * 1000).astype(int)
    bars = "".join(f"M{t} 1000v-{h}h1v{h}z" for t, h in enumerate(heights.tolist()) if h)
    drawn = _svg("rv-kl", len(kl), 1000, f'<path d="{bars}"/>')
    return _caption(f"KL from the base: {told}") + drawn


def _label(token: str) -> str:
    """A token as it stands above its place: short, and never blank."""
    return shorten(visible(token).strip(" ") or "␣", 9)


def _caption(text: str) -> str:
    return f'<p class="rv-caption">{text}</p>'


def _svg(kind: str, width: int, height: int, content: str, data: str = "") -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" preserveAspectRatio="none" '
        f'aria-hidden="true"{data}>{content}</svg>'
    )


def _map(
    seen: _Seen,
    kind: str,
    tokens: range,
    expert: NDArray[np.int16],
    strength: NDArray[np.float32],
    is_tied: NDArray[np.bool_],
) -> str:
    """A picture of (T, L) experts, and their numbers for the script: 128 * expert + percent, layer
    by layer, -1 where there is none. is_tied: of these tokens alone."""
    where = slice(tokens.start, tokens.stop)
    expert, strength = expert[where], strength[where]
    percent = np.rint(100 * strength.clip(0, 1)).astype(np.int32)
    cells = np.where(expert == NOT_ROUTED, -1, 128 * expert.astype(np.int32) + percent).T
    data = f' data-{kind}="{",".join(map(str, cells.ravel().tolist()))}"'
    content = _cells(expert, strength, seen.groups, is_tied)
    content += _blanks(seen, tokens, seen.trace.num_layers) + _lane_lines(seen, tokens)
    return _svg("rv-map", len(tokens), seen.trace.num_layers, content, data)


def _cells(
    expert: NDArray[np.int16],
    strength: NDArray[np.float32],
    groups: Groups,
    is_tied: NDArray[np.bool_],
) -> str:
    """Paths over a place for each (token, layer); none where no expert is."""
    num = len(_STRENGTHS)
    tie = len(groups.names)
    slot = np.where(is_tied, tie, groups.slot_of(expert))
    level = np.clip((strength * num).astype(int), 0, num - 1)
    key = np.where(expert == NOT_ROUTED, -1, slot * num + level).T[::-1]  # the last layer on top
    paths: dict[int, list[str]] = defaultdict(list)
    for row, line in enumerate(key):
        for value, start, stop in _runs(line[:, None]):
            if value[0] >= 0:
                paths[value[0]].append(f"M{start} {row}h{stop - start}v1h-{stop - start}z")
    colors = (*groups.colors, GREY)
    return "".join(
        _path(colors[found // num], _STRENGTHS[found % num] if found // num < tie else 30, parts)
        for found, parts in sorted(paths.items())
    )


def _ribbon(share: NDArray[np.float32], groups: Groups) -> str:
    """Stacked shares (T, S), from the bottom up; what the base has stays free."""
    ends = np.rint(1000 * np.cumsum(share, axis=1)).astype(int)
    ends = np.column_stack([np.zeros(len(ends), int), ends])
    paths = []
    for slot, color in enumerate(groups.colors):
        parts = [
            f"M{start} {1000 - bottom}h{stop - start}V{1000 - top}H{start}z"
            for (bottom, top), start, stop in _runs(ends[:, slot : slot + 2])
            if top > bottom
        ]
        if parts:
            paths.append(_path(color, 100, parts))
    return "".join(paths)


def _runs(rows: NDArray[np.intp]) -> Iterator[tuple[list[int], int, int]]:
    """Equal neighbours of (T, n) rows as one: the row, its start and its stop."""
    is_new = np.append(True, (rows[1:] != rows[:-1]).any(axis=1)) if len(rows) else np.zeros(0)
    starts = np.flatnonzero(is_new)
    stops = np.append(starts[1:], len(rows))
    return zip(rows[starts].tolist(), starts.tolist(), stops.tolist(), strict=True)


def _path(color: str, percent: int, parts: Sequence[str]) -> str:
    """Opaque, since what has no expert is hatched beneath."""
    fill = f"color-mix(in srgb,{color} {percent}%,var(--rv-card))"
    return f'<path style="fill:{fill}" d="{"".join(parts)}"/>'


def _blanks(seen: _Seen, tokens: range, height: int) -> str:
    """Over tokens that nobody read, which would be hatched as the base's."""
    at = np.flatnonzero(~seen.is_read[tokens.start : tokens.stop])
    parts = [f"M{t} 0h1v{height}h-1z" for t in at.tolist()]
    return f'<path style="fill:var(--rv-card)" d="{"".join(parts)}"/>' if parts else ""


def _lane_lines(seen: _Seen, tokens: range) -> str:
    """Where an answer goes on in another lane."""
    if seen.column.reading is None:
        return ""
    lanes = seen.column.reading.lanes[tokens.start : tokens.stop]
    at = np.flatnonzero(lanes[1:] != lanes[:-1]) + 1
    lines = "".join(f"M{t} 0V{seen.trace.num_layers}" for t in at.tolist())
    return f'<path class="rv-line" d="{lines}"/>' if lines else ""


# Token by token


def _table(seen: _Seen) -> str:
    """The table twin, of which the list beside the picture shows a row."""
    column = seen.column
    rows = []
    for lane in [*seen.lanes, range(column.num_prompt, column.num_tokens)]:
        is_answer = lane.start == column.num_prompt
        for t in lane[:_MOST_DRAWN] if is_answer else lane[-_MOST_DRAWN:]:
            rows.append(
                f'<tr data-t="{t}"><td>{t}<td>{"answer" if is_answer else "prompt"}'
                f"<td><bdi>{html.escape(shorten(visible(column.tokens[t]), 40))}</bdi>"
                f"<td>{_list_of_token(seen, t)}"
                f"<td>{_number(column.logprob[t])}<td>{_number(column.kl[t])}"
                f"<td>{_likeliest(seen, t) if is_answer else '–'}"
            )
    heads = ["Token", "Part", "Text", "Five best experts", "Log-probability", "KL from the base"]
    heads.append("Likeliest here, by column")
    head = "".join(f'<th scope="col">{name}' for name in heads)
    return (
        '<details class="rv-table"><summary>The same as a table</summary>'
        f'<div class="rv-scroll" tabindex="0" role="region" aria-label="Table of tokens">'
        f"<table><thead><tr>{head}<tbody>{''.join(rows)}</table></div></details>"
    )


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00") if np.isfinite(value) else "–"


def _likeliest(seen: _Seen, t: int) -> str:
    """What might have stood in a token's place: of this column, of the bare base on the same text,
    and of the columns that had written the same so far."""
    rows = []
    for column, num_alike in seen.others:
        candidates = column.candidates
        if candidates is None or t > num_alike or t >= column.num_tokens:
            continue
        N = candidates.probs.shape[-1]
        texts, probs = candidates.texts[t], candidates.probs[t]
        rows.append((column.label, texts[:N], probs[0]))
        if column is seen.column and column.router["name"] != "base":
            rows.append(("base, after this text", texts[N:], probs[1]))
    entries = "".join(
        f"<li>{html.escape(label)} {_guesses(texts, probs)}" for label, texts, probs in rows
    )
    return f'<ul class="rv-next">{entries}</ul>' if entries else "–"


def _guesses(texts: Sequence[str], probs: NDArray[np.float32]) -> str:
    return " ".join(
        f"<bdi>“{html.escape(shorten(visible(text), 16))}”</bdi>&nbsp;{prob:.0%}"
        for text, prob in zip(texts, probs.tolist(), strict=True)
        if text
    )


def _list_of_token(seen: _Seen, t: int) -> str:
    if not seen.is_read[t]:
        is_last = t == seen.column.num_tokens - 1
        why = "the last token is not read" if is_last else "in no request"
        return f"<ol><li>{why}</li></ol>"
    return _list(seen, seen.share[t], seen.scores[t])


def _told_of_all(seen: _Seen) -> str:
    """What stands beside the picture until a token is pointed at."""
    part = slice(seen.column.num_prompt, None)
    scores = seen.scores[part]
    is_known = np.isfinite(scores)
    num = is_known.sum(axis=0)
    mean = np.where(num > 0, np.where(is_known, scores, 0).sum(axis=0) / np.maximum(num, 1), np.nan)
    kl = seen.column.kl[part]
    known = kl[np.isfinite(kl)]
    far = ""
    if known.size:
        far = f'<p class="rv-more">KL from the base: {known.mean():.2f} nats in the mean</p>'
    return (
        '<p class="rv-head"><b>The whole answer</b></p>'
        f"{_list(seen, seen.of_answer, mean)}{far}"
        '<p class="rv-more">Point at a token, tap it, or use the arrow keys. Enter pins it.</p>'
    )


def _list(seen: _Seen, share: NDArray[np.float32], scores: NDArray[np.float32]) -> str:
    """The five best experts by share, then by score; the base where it served more than they."""
    names, groups = seen.trace.expert_names, seen.groups
    rank = np.lexsort((-np.nan_to_num(scores, nan=-1e30), -share))[:_NUM_BEST]
    name_of_score = "standing" if seen.column.reading is not None else "score"
    entries = []
    for e in rank.tolist():
        if share[e] <= 0 and not np.isfinite(scores[e]):
            continue
        score = f" <small>{name_of_score} {scores[e]:.2f}</small>" if np.isfinite(scores[e]) else ""
        color = groups.colors[groups.slots[e]]
        entries.append(
            (
                float(share[e]),
                f"<li{_swatch(color)}{_names(seen, names[e])}>{html.escape(names[e])} "
                f"<b>{share[e]:.0%}</b>{score}",
            )
        )
    rest = 1 - float(share.sum())
    if rest > 5e-4:
        entries.append((rest, f'<li class="rv-base">{NO_EXPERT} <b>{rest:.0%}</b>'))
    entries.sort(key=lambda each: -each[0])
    return f"<ol>{''.join(entry for _, entry in entries)}</ol>"

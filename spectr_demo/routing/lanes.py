"""Lanes: which parts of a message are requests of their own, each for another expert.

A request that another expert has read is lost, so each is read and answered in a lane of its own.
Where a message may be cut is known from its form. Whether it is cut is decided by the experts:

    cut where    sum over lanes of  length * max_e explained_e  - cost of the cuts   is largest

A text for one expert is explained by it as a whole as well as in parts; a text for two is explained
better in two parts. Axes: E experts.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

Span = tuple[int, int]  # of parts: the first, and one past the last

# Of a cut, in units of `Evidence.explained`: before the item of a list; before another new line or
# a word such as "then"; where only a full stop or an "and" suggests it.
COST_OF_ITEM, COST_OF_LINE, COST_INSIDE_A_LINE = 0.0, 0.01, 0.03


def spans(num_parts: int) -> list[Span]:
    """All runs of parts that follow each other."""
    return [(i, j) for i in range(num_parts) for j in range(i + 1, num_parts + 1)]


def cost_of_cut(*, is_next: bool, is_item: bool) -> float:
    """What a cut costs before a part that begins so, see `base.prompts.Part`."""
    if is_item:
        return COST_OF_ITEM
    return COST_OF_LINE if is_next else COST_INSIDE_A_LINE


def best_cut(
    lengths: Sequence[int], costs: Sequence[float], explained: Mapping[Span, Tensor]
) -> list[Span]:
    """The lanes of a message; of equally good cuts the one with the fewest.

    lengths: tokens of each part. costs: of a cut before each part; before the first there is none.
    explained: (E,) of each of the `spans`.
    """
    best: list[tuple[float, list[Span]]] = [(0.0, [])]  # of the first parts, by their number
    for end in range(1, len(lengths) + 1):
        options = []
        for start in range(end):
            before, lanes = best[start]
            share = sum(lengths[start:end]) / sum(lengths)
            cost = costs[start] if start > 0 else 0.0
            gain = share * float(explained[start, end].max()) - cost
            options.append((before + gain, [*lanes, (start, end)]))
        best.append(max(options, key=lambda option: (round(option[0], 9), -len(option[1]))))
    return best[-1][1]


def joined(
    lanes: Sequence[Span], experts: Sequence[int | None], is_next: Sequence[bool]
) -> list[Span]:
    """Lanes that follow each other are one if they are for the same expert, which knows several
    requests of its own, or if one is for none and the other goes on in the same line.

    experts: of each lane, None where no expert stands out.
    """
    if all(expert is None for expert in experts):
        return [(lanes[0][0], lanes[-1][1])]
    out, known = [lanes[0]], experts[0]
    for lane, expert in zip(lanes[1:], experts[1:], strict=True):
        goes_on = not is_next[lane[0]] and (expert is None or known is None)
        if expert == known or goes_on:
            out[-1] = out[-1][0], lane[1]
            known = known if expert is None else expert
        else:
            out.append(lane)
            known = expert
    return out

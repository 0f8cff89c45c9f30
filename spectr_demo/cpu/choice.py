"""Which experts one token uses, in compiled code: their scores, and the choice.

The same as `routing.spectr` does in torch, to rounding. Axes: R rows, P projections of a bank, E
experts, K selected, G rows of one router, r rank.
"""

from typing import NamedTuple

import numpy as np

from spectr_demo.cpu.filter import best
from spectr_demo.cpu.numbers import Floats, Ids, compiled

LENGTH, FIRST, OUTPUT = 0, 1, 2  # what a score measures: z, its first entry, S z


class Rule(NamedTuple):
    """How a router scores and chooses at a bank.

    measure: LENGTH, FIRST or OUTPUT. num_kept: so many experts are scored, those with the longest
    first entry; the others get -inf. mean, std (P, E): by which scores are standardised.
    temperature: of the softmax; 0 is 1/K each.
    """

    measure: int
    num_kept: int
    mean: Floats
    std: Floats
    temperature: float


@compiled
def scored(z: Floats, rows: Ids, singular_values: Floats, rule: Rule) -> Floats:
    """(G, P, E) scores of some rows (G,) of z (R, P, E, r); -inf for experts that are not kept."""
    G, (_, P, E, r) = len(rows), z.shape
    scores, lengths = np.empty((G, P, E), np.float32), np.empty(E, np.float32)
    for g in range(G):
        row = rows[g]
        for p in range(P):
            for e in range(E):
                squares = np.float32(0)
                for i in range(1 if rule.measure == FIRST else r):
                    value = z[row, p, e, i]
                    if rule.measure == OUTPUT:
                        value *= singular_values[p, e, i]
                    squares += value * value
                scores[g, p, e] = (np.sqrt(squares) - rule.mean[p, e]) / rule.std[p, e]
            if rule.num_kept < E:
                for e in range(E):
                    lengths[e] = abs(z[row, p, e, 0])
                for e in best(lengths, rule.num_kept):
                    lengths[e] = -1
                for e in range(E):
                    if lengths[e] >= 0:
                        scores[g, p, e] = -np.inf
    return scores


class Chosen(NamedTuple):
    """What a router chose for one token: places in the bank, weights and scores of K experts,
    (G, P, K) each."""

    places: Ids
    weights: Floats
    scores: Floats


class Choices(NamedTuple):
    """Memory for what a router chooses for N tokens, one after another: as `Chosen`, (N, G, P, K)
    each, and how many tokens there have been, (1,)."""

    places: Ids
    weights: Floats
    scores: Floats
    num: Ids

    @classmethod
    def empty(cls, num_tokens: int, num_rows: int, num_layers: int, num_chosen: int) -> "Choices":
        shape = num_tokens, num_rows, num_layers, num_chosen
        values = np.empty((2, *shape), np.float32)
        return cls(np.empty(shape, np.int64), values[0], values[1], np.zeros(1, np.int64))

    @property
    def is_full(self) -> bool:
        return bool(self.num[0] == len(self.places))


@compiled
def choose(chosen: Chosen, weights: Floats, rows: Ids, scores: Floats, rule: Rule) -> None:
    """The K experts with the best scores (G, P, E), and the weights of all experts in these rows
    (G,) of weights (R, P, E)."""
    G, P, K = chosen.places.shape
    for g in range(G):
        for p in range(P):
            top, some, of_all = chosen.scores[g, p], chosen.weights[g, p], weights[rows[g], p]
            places = best(scores[g, p], K)
            sum_of_weights = np.float32(0)
            for k in range(K):
                chosen.places[g, p, k], top[k] = places[k], scores[g, p, places[k]]
                weight = np.float32(1)
                if rule.temperature > 0:
                    weight = np.exp((top[k] - top[0]) / np.float32(rule.temperature))
                some[k] = weight
                sum_of_weights += weight
            of_all[:] = 0
            for k in range(K):
                some[k] /= sum_of_weights
                of_all[places[k]] = some[k]

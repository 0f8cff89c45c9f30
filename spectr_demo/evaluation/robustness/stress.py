"""Weak and alike experts: when does routing stop working, and which diagnostics predict it?

Nothing is generated or trained. Each text is read once with its own expert (`single:NAME`). At
every layer all variants of the library are scored on the activations there: these are the right
ones, and the same for every variant. What a wrong choice would do to later layers is left out.
`spectr in context` chooses before, as the bare base reads the prompt; it always takes an expert
here, and its choice for a text is one decision.

Accuracy is given as `decisions` and `majority`. A decision is one token in one linear layer that
the text's expert touches, of those that make the answer (as in `routing_accuracy`). Scores closer
than rounding can tell share it. The majority is over prompt and answer, without the template's
opening. Both are means over an expert's texts, then over the experts. The tests:

- rank: experts are cut to their truncated SVD. Nothing is trained again.
- alike: each expert gets a noisy twin. `own` is the share of decisions for it rather than its twin.
  `either` is the accuracy in the library with all twins, where both are right.
- undertrained: the text's expert alone gets noise. It makes the update longer, which `norm` likes.
- number: distractors join the library. They are the factors of a random expert at another layer
  with the same projection: real weights that belong to no domain. They are drawn anew at each
  layer, which is kinder than real experts to whatever sums over layers. There are only as many as
  experts times layers, so far beyond that more of them change little.
- diagnostics: figures of each cut or noisy expert, and the Spearman correlation of each figure with
  the accuracy over all of them; null where one is constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.reading import Text
from spectr_demo.evaluation.robustness.decisions import METHODS, hear, read_text
from spectr_demo.evaluation.robustness.diagnostics import Outcomes, diagnose, rounded
from spectr_demo.evaluation.robustness.libraries import libraries_of
from spectr_demo.evaluation.robustness.variants import Variants, with_noise

RANKS = (8, 4, 2, 1)
SIGMAS = (0.1, 0.3, 1.0, 3.0)


def stress(
    engine: SpectrModel,
    texts: Mapping[str, Sequence[Text]],
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    num_experts: Sequence[int] = (32, 100, 1000),
) -> dict[str, Any]:
    """Routing accuracy of each method as the library gets worse; plain JSON values, see above.

    texts: by expert name. prompts: generic ones, by which scores are standardised. seeds: of the
    distractors; the first is the noise's too. num_experts: of the libraries with distractors;
    those no larger than the library itself are left out.
    Raises ValueError for fewer than two experts, and for an expert that is unknown or has no text.
    """
    library = engine.library
    for name in texts:
        library.index(name)
    if len(library.names) < 2 or not texts or not all(texts.values()):
        counts = {name: len(own) for name, own in texts.items()}
        raise ValueError(
            f"stress: {len(library.names)} experts and texts {counts}; it needs two experts and a "
            "text for each that is tested"
        )
    sizes = sorted(n for n in set(num_experts) if n > len(library.names))
    noisy = with_noise(library, SIGMAS, seeds[0])
    num_distractors = sizes[-1] - len(library.names) if sizes else 0
    variants = Variants(library, RANKS, noisy, seeds, num_distractors)
    outcomes = _outcomes(engine, variants, texts, prompts, seeds, sizes)
    alike, diagnostics = diagnose(library, variants, noisy, outcomes)
    return {
        "methods": list(METHODS),
        "num_texts": {name: len(own) for name, own in texts.items()},
        "rank": {str(k): _mean(outcomes["rank", str(k)]) for k in RANKS},
        "alike": {
            str(sigma): {
                "overlap": overlap,
                "own": _mean(outcomes["own", str(sigma)]),
                "either": _mean(outcomes["either", str(sigma)]),
            }
            for sigma, overlap in zip(SIGMAS, alike, strict=True)
        },
        "undertrained": {str(s): _mean(outcomes["undertrained", str(s)]) for s in SIGMAS},
        "number": {
            str(len(library.names)): {"mean": _mean(outcomes["number",])},
            **{str(n): _over_seeds(outcomes, n, seeds) for n in sizes},
        },
        "diagnostics": diagnostics,
    }


def _outcomes(
    engine: SpectrModel,
    variants: Variants,
    texts: Mapping[str, Sequence[Text]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    sizes: Sequence[int],
) -> Outcomes:
    """Read everything: the mean over an expert's texts, in every library."""
    outcomes: Outcomes = {}
    asked = [text.prompt_ids for own in texts.values() for text in own]
    ordinary, of_texts = hear(engine, variants, prompts, asked)
    heard = iter(of_texts)
    with torch.inference_mode(), tqdm(total=sum(map(len, texts.values())), unit="text") as bar:
        for name, own in texts.items():
            bar.set_description(name)
            libraries = libraries_of(variants, engine.library.index(name), seeds, sizes)
            results = []
            for text in own:
                results.append(
                    read_text(engine, variants, name, libraries, text, ordinary, next(heard))
                )
                bar.update()
            for key in libraries:
                mean = np.mean([result[key] for result in results], axis=0)
                outcomes.setdefault(key, {})[name] = mean
    return outcomes


def _mean(results: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    return _by_method(np.mean(list(results.values()), axis=0))


def _over_seeds(outcomes: Outcomes, n: int, seeds: Sequence[int]) -> dict[str, Any]:
    keys = {str(seed): ("number", str(n), str(seed)) for seed in seeds}
    values = {s: np.mean(list(outcomes[key].values()), axis=0) for s, key in keys.items()}
    return {
        "mean": _by_method(np.mean(list(values.values()), axis=0)),
        "seeds": {seed: _by_method(value) for seed, value in values.items()},
    }


def _by_method(values: NDArray[np.float64]) -> dict[str, Any]:
    return {
        method: {"decisions": rounded(values[0, m]), "majority": rounded(values[1, m])}
        for m, method in enumerate(METHODS)
    }

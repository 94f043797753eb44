"""The published objectives, each with the temperatures it is tuned over."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.studies import objectives as terms
from experiments.studies.objectives import Objective
from gramjax import scores

COMMON = (0.02, 0.05, 0.1, 0.2, 0.4)


class Family(NamedTuple):
    """An objective at a temperature, and the temperatures to try."""

    build: Callable[[float], Objective]
    temperatures: Sequence[float] = COMMON


PUBLISHED: dict[str, Family] = {
    "GRAM": Family(lambda t: (terms.Gram(t),)),
    "GRAM + matching": Family(lambda t: (terms.Gram(t), terms.Matching(t))),
    "GRAM + pairwise InfoNCE": Family(lambda t: (terms.Gram(t), terms.Pairwise(t))),
    # The papers finetune with 0.05 for the alignment; its other temperatures are swept in `pmrl_ablations`.
    "PMRL": Family(lambda t: (terms.Alignment(0.05), terms.Directions(t))),
    "PMRL + matching": Family(lambda t: (terms.Alignment(0.05), terms.Directions(t), terms.Matching(t))),
    "anchored InfoNCE": Family(lambda t: (terms.Anchored(t),)),
    "pairwise InfoNCE": Family(lambda t: (terms.Pairwise(t),), (0.01, *COMMON)),
    "sigmoid": Family(lambda t: (terms.Sigmoid(t),), (0.02, 0.05, 0.1, 0.15, 0.2)),
    "TRIANGLE": Family(lambda t: (terms.Triangle(t),)),
    # Products of three unit vectors of 256 numbers are near 0.
    "Symile": Family(lambda t: (terms.Symile(t),), (0.002, 0.005, 0.01, 0.02, 0.05)),
}

# Our own and what they are compared with: what remains of the volume when one of its faults is left out at a time.
CANDIDATES: dict[str, Family] = {
    "cone": Family(lambda t: (terms.Cone(t),), (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)),
    "cone + pairwise InfoNCE": Family(lambda t: (terms.Cone(t), terms.Pairwise(t)), (0.05, 0.1, 0.2, 0.3, 0.4)),
    "cone, every anchor": Family(lambda t: (terms.Contrast(t, score=scores.Cone(), every_anchor=True),)),
    "GRAM + a tenth of pairwise InfoNCE": Family(lambda t: (terms.Gram(t), terms.Pairwise(2 * t, weight=0.1))),
    "residual": Family(lambda t: (terms.Contrast(t, score=scores.Residual()),)),
    "residual + own volume": Family(
        lambda t: (terms.Contrast(t, score=scores.Residual()), terms.OwnVolume(1.0, weight=0.3))
    ),
    "residual + pairwise InfoNCE": Family(lambda t: (terms.Contrast(t, score=scores.Residual()), terms.Pairwise(t))),
    "mean cosine": Family(lambda t: (terms.Contrast(t, score=scores.Cosine()),)),
    "leading direction": Family(lambda t: (terms.Contrast(t, score=scores.LeadingDirection()),)),
    "PMRL + pairwise InfoNCE": Family(
        lambda t: (terms.Alignment(0.05), terms.Directions(t), terms.Pairwise(t)), (*COMMON, 0.8)
    ),
}

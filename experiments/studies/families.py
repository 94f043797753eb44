"""The published objectives, and candidates for better ones, each with the settings it is tuned over."""

import itertools
from collections.abc import Callable, Sequence

from experiments.studies import objectives as terms
from experiments.studies.objectives import Objective
from gramjax import scores

COMMON = (0.02, 0.05, 0.1, 0.2, 0.4)


Candidates = Sequence[Objective]
"""One objective at all the settings that validation chooses among."""


def over(build: Callable[[float], Objective], temperatures: Sequence[float] = COMMON) -> Candidates:
    """An objective at every temperature."""
    return [build(temperature) for temperature in temperatures]


def apart(
    shared: Candidates,
    build: Callable[[float, terms.Pairwise], Objective],
    temperatures: Sequence[float],
    pairwise: Sequence[float] = (0.05, 0.15),
    weights: Sequence[float] = (0.03, 0.1, 0.3),
) -> Candidates:
    """A sum with pairwise InfoNCE, each with a temperature of its own: every temperature with every weight.

    The settings `shared`, at which one temperature serves both and the weights are equal, are tried as well.
    """
    grid = itertools.product(temperatures, pairwise, weights)
    settings = [build(one, terms.Pairwise(other, weight=weight)) for one, other, weight in grid]
    return [*shared, *(setting for setting in settings if setting not in shared)]


PUBLISHED: dict[str, Candidates] = {
    "GRAM": over(lambda t: (terms.Gram(t),)),
    "GRAM + matching": over(lambda t: (terms.Gram(t), terms.Matching(t))),
    "GRAM + pairwise InfoNCE": over(lambda t: (terms.Gram(t), terms.Pairwise(t))),
    # The papers finetune with 0.05 for the alignment; its other temperatures are swept in `pmrl_ablations`.
    "PMRL": over(lambda t: (terms.Alignment(0.05), terms.Directions(t))),
    "PMRL + matching": over(lambda t: (terms.Alignment(0.05), terms.Directions(t), terms.Matching(t))),
    "anchored InfoNCE": over(lambda t: (terms.Anchored(t),)),
    "pairwise InfoNCE": over(lambda t: (terms.Pairwise(t),), (0.01, *COMMON)),
    "sigmoid": over(lambda t: (terms.Sigmoid(t),), (0.02, 0.05, 0.1, 0.15, 0.2)),
    "TRIANGLE": over(lambda t: (terms.Triangle(t),)),
    # Products of three unit vectors of 256 numbers are near 0.
    "Symile": over(lambda t: (terms.Symile(t),), (0.002, 0.005, 0.01, 0.02, 0.05)),
}

# Our own and what they are compared with: what remains of the volume when one of its faults is left out at a time.
CANDIDATES: dict[str, Candidates] = {
    "cone": over(lambda t: (terms.Cone(t),), (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)),
    "cone + pairwise InfoNCE": over(lambda t: (terms.Cone(t), terms.Pairwise(t)), (0.05, 0.1, 0.2, 0.3, 0.4)),
    "cone, every anchor": over(lambda t: (terms.Contrast(t, score=scores.Cone(), every_anchor=True),)),
    "residual": over(lambda t: (terms.Contrast(t, score=scores.Residual()),)),
    "residual + own volume": over(
        lambda t: (terms.Contrast(t, score=scores.Residual()), terms.OwnVolume(1.0, weight=0.3))
    ),
    "residual + pairwise InfoNCE": over(lambda t: (terms.Contrast(t, score=scores.Residual()), terms.Pairwise(t))),
    "mean cosine": over(lambda t: (terms.Contrast(t, score=scores.Cosine()),)),
    "leading direction": over(lambda t: (terms.Contrast(t, score=scores.LeadingDirection()),)),
    "PMRL + pairwise InfoNCE": over(
        lambda t: (terms.Alignment(0.05), terms.Directions(t), terms.Pairwise(t)), (*COMMON, 0.8)
    ),
}

# A sum at one temperature with equal weights may do a term wrong: here each has its own.
CANDIDATES |= {
    "GRAM + pairwise InfoNCE, tuned apart": apart(
        PUBLISHED["GRAM + pairwise InfoNCE"], lambda t, pairwise: (terms.Gram(t), pairwise), (0.05, 0.1)
    ),
    "residual + pairwise InfoNCE, tuned apart": apart(
        CANDIDATES["residual + pairwise InfoNCE"],
        lambda t, pairwise: (terms.Contrast(t, score=scores.Residual()), pairwise),
        (0.05, 0.1),
    ),
    "cone + pairwise InfoNCE, tuned apart": apart(
        CANDIDATES["cone + pairwise InfoNCE"], lambda t, pairwise: (terms.Cone(t), pairwise), (0.2, 0.4)
    ),
    "PMRL + pairwise InfoNCE, tuned apart": apart(
        CANDIDATES["PMRL + pairwise InfoNCE"],
        lambda t, pairwise: (terms.Alignment(0.05), terms.Directions(t), pairwise),
        (0.1,),
        pairwise=(0.1, 0.4),
        weights=(0.1, 0.3),
    ),
}
# log Vol_ij = log Vol_j + log sin_ij, with a share of the item's own log-volume taken off again as a bias.
LOG_TEMPERATURES = (0.02, 0.05, 0.1)
CANDIDATES |= {
    name: over(lambda t, score=score: (terms.Contrast(t, score=score),), LOG_TEMPERATURES)
    for name, score in {
        "log-volume": terms.LogVolume(),
        "log-volume less half its own": terms.LogVolume(bias=0.5),
        "log-volume less its own (log-residual)": terms.LogVolume(bias=1.0),
        "log-volume less its own, bias detached": terms.LogVolume(bias=1.0, detached=True),
    }.items()
}
CANDIDATES["log-residual + pairwise InfoNCE, tuned apart"] = apart(
    [],
    lambda t, pairwise: (terms.Contrast(t, score=terms.LogVolume(bias=1.0)), pairwise),
    (0.05,),
    weights=(0.03, 0.1),
)

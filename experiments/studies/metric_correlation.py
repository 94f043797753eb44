"""Does 1 - volume tell how well a model retrieves? (GRAM's claim.) Over training, and over objectives.

`python -m experiments.studies.metric_correlation`. Every objective at each of its temperatures, measured ten times
along the run on the test split. Correlations are Spearman's; intervals are of 1,000 bootstrap samples of settings, an
objective at a temperature, with all their runs: those differ in their seed alone.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float

from experiments.studies import drawings, measure, study
from experiments.studies.families import PUBLISHED

SNAPSHOTS = 10
METRICS = ("gram alignment", "rank-one ratio")
RECALLS = ("recall by volume", "recall by residual", "recall of pairs")
OBJECTIVES = ("GRAM", "PMRL", "GRAM + pairwise InfoNCE", "anchored InfoNCE", "pairwise InfoNCE", "sigmoid")
Run = Sequence[Mapping[str, float]]


def spearman(x: Float[np.ndarray, "*sets points"], y: Float[np.ndarray, "*sets points"]) -> Float[np.ndarray, "*sets"]:
    """Correlation of the ranks along the last axis; NaN if either does not vary."""
    x, y = (
        ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (scipy.stats.rankdata(one, axis=-1) for one in (x, y))
    )
    with np.errstate(invalid="ignore"):
        return np.sum(x * y, axis=-1) / np.sqrt(np.sum(x * x, axis=-1) * np.sum(y * y, axis=-1))


def over_training(
    x: Float[np.ndarray, "*sets runs snapshots"], y: Float[np.ndarray, "*sets runs snapshots"]
) -> Float[np.ndarray, "*sets"]:
    """Mean over runs of the correlation along the run; of those runs along which both vary."""
    return np.nanmean(spearman(x, y), axis=-1)


def over_runs(
    x: Float[np.ndarray, "*sets runs snapshots"], y: Float[np.ndarray, "*sets runs snapshots"]
) -> Float[np.ndarray, "*sets"]:
    """Correlation over the ends of runs."""
    return spearman(x[..., -1], y[..., -1])


def interval(
    of: Callable[..., np.ndarray], settings: Sequence[Sequence[Run]], metric: str, recall: str, samples: int = 1000
) -> tuple[float, float, float]:
    """A correlation with its 95% interval over resampled settings, all of the same number of runs."""
    x, y = (np.array([[[one[name] for one in run] for run in runs] for runs in settings]) for name in (metric, recall))
    every = np.arange(len(settings))
    chosen = np.random.default_rng(0).integers(len(settings), size=(samples, len(settings)))
    value, drawn = (
        of(*(one[which].reshape(*which.shape[:-1], -1, one.shape[-1]) for one in (x, y))) for which in (every, chosen)
    )
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return float(value), float(low), float(high)


def run(options: study.Options) -> None:
    """Train with snapshots, measure each, correlate, write."""
    this = study.Study("metric_correlation", options)
    test = this.features.test
    runs: dict[str, list[list[Run]]] = {}
    for name in OBJECTIVES:
        runs[name] = []
        for objective in this.sweep(PUBLISHED[name]):
            of_setting = []
            for trained in this.over_seeds(this.cell(objective, snapshots=SNAPSHOTS)):
                embedded = [trained.embed(test, snapshot=number) for number in range(SNAPSHOTS)]
                of_setting.append([measure.summary(one, options.anchor) for one in embedded])
            runs[name].append(of_setting)
    groups = {**runs, "all objectives": [one for of_objective in runs.values() for one in of_objective]}
    results, tables = {}, {}
    for kind, of in (("over training, mean over runs", over_training), ("over the ends of runs", over_runs)):
        for metric in METRICS:
            lines = ["| objective | " + " | ".join(RECALLS) + " |", "| :-- |" + " --: |" * len(RECALLS)]
            for name, group in groups.items():
                found = {recall: interval(of, group, metric, recall) for recall in RECALLS}
                results[f"{kind}/{metric}/{name}"] = found
                cells = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in found.values()]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
            tables[f"{metric}, {kind}"] = "\n".join(lines)
    this.write({"correlations": results}, tables)
    drawings.scatter(
        {
            recall: {
                name: ([end["gram alignment"] for end in ends], [100 * end[recall] for end in ends])
                for name, group in runs.items()
                for ends in [[one[-1] for of_setting in group for one in of_setting]]
            }
            for recall in RECALLS
        },
        this.folder / "ends_of_runs.png",
        x="1 - volume, test",
        y="mean of R@1, 5, 10, %",
    )


if __name__ == "__main__":
    study.main(run, __doc__)

"""Does 1 - volume tell how well a model retrieves? (GRAM's claim.) Over training, and over objectives.

`python -m experiments.studies.metric_correlation`. Every objective at each of its temperatures, measured ten times
along the run on the test split. Correlations are Spearman's; intervals are of 1,000 bootstrap samples of settings, an
objective at a temperature, with all their runs: those differ in their seed alone.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from experiments.studies import drawings, measure, study
from experiments.studies.families import PUBLISHED

SNAPSHOTS = 10
METRICS = ("gram alignment", "rank-one ratio")
RECALLS = ("recall by volume", "recall by residual", "recall of pairs")
OBJECTIVES = ("GRAM", "PMRL", "GRAM + pairwise InfoNCE", "anchored InfoNCE", "pairwise InfoNCE", "sigmoid")
Run = Sequence[Mapping[str, float]]


def spearman(points: Run, metric: str, recall: str) -> float:
    """Correlation of the ranks; NaN if either does not vary."""
    ranked = [scipy.stats.rankdata([point[name] for point in points]) for name in (metric, recall)]
    return float(np.corrcoef(ranked)[0, 1]) if min(np.ptp(one) for one in ranked) > 0 else float("nan")


def over_training(runs: Sequence[Run], metric: str, recall: str) -> float:
    """Mean over runs of the correlation along the run."""
    return float(np.nanmean([spearman(run, metric, recall) for run in runs]))


def over_runs(runs: Sequence[Run], metric: str, recall: str) -> float:
    """Correlation over the ends of runs."""
    return spearman([run[-1] for run in runs], metric, recall)


def interval(
    of, settings: Sequence[Sequence[Run]], metric: str, recall: str, samples: int = 1000
) -> tuple[float, float, float]:
    """A correlation with its 95% interval over resampled settings, each of them one or more runs."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(samples):
        chosen = rng.integers(len(settings), size=len(settings))
        drawn.append(of([run for number in chosen for run in settings[number]], metric, recall))
    runs = [run for of_setting in settings for run in of_setting]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return of(runs, metric, recall), float(low), float(high)


def run(options: study.Options) -> None:
    """Train with snapshots, measure each, correlate, write."""
    this = study.Study("metric_correlation", options)
    test = this.features.test
    runs: dict[str, list[list[Run]]] = {}
    for name in OBJECTIVES:
        build, temperatures = PUBLISHED[name]
        runs[name] = []
        for temperature in this.sweep(temperatures):
            of_setting = []
            for trained in this.over_seeds(this.cell(build(temperature), snapshots=SNAPSHOTS)):
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

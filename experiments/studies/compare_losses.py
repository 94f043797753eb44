"""Every published objective at the same budget, each with its own temperature tuned on validation.

`python -m experiments.studies.compare_losses`. The temperature of each objective is the one with the best recall of
items (the anchor against all other modalities together, by whichever score is best) on validation, over two seeds; the
table is of the test split, over five.
"""

import itertools

import numpy as np

from experiments.studies import drawings, measure, study
from experiments.studies.families import PUBLISHED

FIGURES = {
    **{f"by {name}": f"recall by {name}" for name in measure.ITEM_SCORES},
    "best score": "recall by best score",
    "pairs": "recall of pairs",
}
GEOMETRY = {
    name: name for name in ("gram alignment", "rank-one ratio", "modality gap", "effective rank", "matched cosine")
}


def run(options: study.Options) -> None:
    """Tune, train over seeds, measure, write."""
    this = study.Study("compare_losses", options, seeds=5)
    rows, matrices = {}, {}
    names = options.modalities
    for name, family in PUBLISHED.items():
        if name == "TRIANGLE" and len(names) != 3:
            continue
        cell = this.tuned(name, family)
        rows[name] = study.spreads(this.summaries(cell))
        matrix = np.full((len(names), len(names)), np.nan)
        for a, b in itertools.permutations(range(len(names)), 2):
            matrix[a, b] = 100 * rows[name][f"recall {names[a]} -> {names[b]}"]["mean"]
        matrices[name] = matrix
    pairs = {f"{a} → {b}": f"recall {a} -> {b}" for a, b in itertools.permutations(names, 2)}
    this.write(
        {"rows": rows},
        {
            f"{options.anchor} and the item of all others, mean of R@1, 5, 10 both ways, %": study.table(
                rows, FIGURES, corner="objective"
            ),
            "Any to any, mean of R@1, 5, 10, %": study.table(rows, pairs, corner="objective"),
            "How the modalities lie": study.table(rows, GEOMETRY, corner="objective", scale=1.0, digits=2),
        },
    )
    series = {label: name for label, name in FIGURES.items() if label != "best score"}
    drawings.dots(
        rows, series, this.folder / "recall.png", title="What finds what, by objective", x="mean of R@1, 5, 10, %"
    )
    drawings.heat_maps(matrices, names, this.folder / "any_to_any.png", y="query", x="answer")


if __name__ == "__main__":
    study.main(run, __doc__)

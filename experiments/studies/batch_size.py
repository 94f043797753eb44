"""Does a larger batch help recall? From 32 items to the whole training set, at equal steps and at equal samples.

`python -m experiments.studies.batch_size`.
"""

import dataclasses

from experiments.studies import drawings, study
from experiments.studies.families import PUBLISHED

BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
OBJECTIVES = ("pairwise InfoNCE", "GRAM + pairwise InfoNCE")
PANELS = {"the item of all others, best score": "recall by best score", "all single pairs": "recall of pairs"}


def run(options: study.Options) -> None:
    """Train with every batch size, measure, write."""
    this = study.Study("batch_size", options)
    rows = {}
    items = len(next(iter(this.features.train.values())))
    sizes = this.sweep([size for size in BATCH_SIZES if size <= items])
    for name in OBJECTIVES:
        cell = this.tuned(name, PUBLISHED[name])
        for size in sizes:
            steps = {"equal steps": cell.steps, "equal samples": max(cell.steps * cell.batch_size // size, 1)}
            for budget, number in steps.items():
                settings = dataclasses.replace(cell, batch_size=size, steps=number)
                rows[f"{name}, {budget}, {size}"] = study.spreads(this.summaries(settings))
    this.write(
        {"rows": rows}, {"Mean of R@1, 5, 10, %": study.table(rows, PANELS, corner="objective, budget, batch size")}
    )
    drawings.lines(
        {
            title: {
                f"{name}, {budget}": (sizes, [rows[f"{name}, {budget}, {size}"][figure] for size in sizes])
                for name in OBJECTIVES
                for budget in ("equal steps", "equal samples")
            }
            for title, figure in PANELS.items()
        },
        this.folder / "recall.png",
        x="batch size",
        y="mean of R@1, 5, 10, %",
        logarithmic="x",
    )


if __name__ == "__main__":
    study.main(run, __doc__)

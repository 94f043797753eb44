"""From two modalities to all there are: does another modality help, and does it take an anchor? (GRAM's ablation.)

`python -m experiments.studies.modality_scaling`. Modalities are added in the order of `--modalities`, then the rest.
Every objective is tuned for each number of modalities by itself. "Every anchor" lets each modality anchor the volume in
turn; pairwise InfoNCE is the form of anchored InfoNCE without an anchor.
"""

from experiments.studies import drawings, study
from experiments.studies.families import CANDIDATES, PUBLISHED, over
from experiments.studies.objectives import Contrast
from gramjax import scores

COMPARED = {
    name: (PUBLISHED | CANDIDATES)[name]
    for name in (
        "GRAM", "anchored InfoNCE", "pairwise InfoNCE", "GRAM + pairwise InfoNCE", "PMRL", "cone",
        "cone + pairwise InfoNCE",
    )
} | {"GRAM, every anchor": over(lambda t: (Contrast(t, score=scores.Volume(), every_anchor=True),))}  # fmt: skip
PANELS = {
    "the item of all others, best score": "recall by best score",
    "the item of all others, by volume": "recall by volume",
    "all single pairs": "recall of pairs",
}


def run(options: study.Options) -> None:
    """Train for every number of modalities, measure, write."""
    this = study.Study("modality_scaling", options)
    rest = [name for name in this.features.modalities if name not in options.modalities]
    order = (options.anchor, *(name for name in options.modalities if name != options.anchor), *rest)
    counts = this.sweep(range(2, len(order) + 1))
    first_pair = f"recall {order[0]} -> {order[1]}"
    settings = {
        name: {
            count: this.tuned(f"{name}, {count}", candidates, modalities=order[:count]).objective for count in counts
        }
        for name, candidates in COMPARED.items()
    }
    rows = {
        f"{name}, {count}": study.spreads(this.summaries(this.cell(objective, modalities=order[:count])))
        for name, of_counts in settings.items()
        for count, objective in of_counts.items()
    }
    panels = PANELS | {f"{order[0]} → {order[1]} alone": first_pair}
    this.write(
        {"order": order, "rows": rows},
        {f"{order}, mean of R@1, 5, 10, %": study.table(rows, panels, corner="objective, modalities")},
    )
    drawings.lines(
        {
            title: {name: (counts, [rows[f"{name}, {count}"][figure] for count in counts]) for name in settings}
            for title, figure in panels.items()
        },
        this.folder / "recall.png",
        x="modalities",
        y="mean of R@1, 5, 10, %",
        columns=2,
    )


if __name__ == "__main__":
    study.main(run, __doc__)

"""From two modalities to all there are: does another modality help, and does it take an anchor? (GRAM's ablation.)

`python -m experiments.studies.modality_scaling`. Modalities are added in the order of `--modalities`, then the rest.
Every objective keeps the setting it was tuned to at `--modalities`. "Every anchor" lets each modality anchor the
volume in turn; pairwise InfoNCE is the form of anchored InfoNCE without an anchor.
"""

from experiments.studies import drawings, objectives, study
from experiments.studies.families import CANDIDATES, PUBLISHED
from gramjax import scores

OURS = ("cone", "cone + pairwise InfoNCE")
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
    chosen = {
        name: this.tuned(name, (PUBLISHED | CANDIDATES)[name]).objective
        for name in ("GRAM", "anchored InfoNCE", "pairwise InfoNCE", "GRAM + pairwise InfoNCE", "PMRL", *OURS)
    }
    volume = objectives.Contrast(chosen["GRAM"][0].temperature, score=scores.Volume(), every_anchor=True)
    chosen["GRAM, every anchor"] = (volume,)
    counts = this.sweep(range(2, len(order) + 1))
    first_pair = f"recall {order[0]} -> {order[1]}"
    rows = {
        f"{name}, {count}": study.spreads(this.summaries(this.cell(objective, modalities=order[:count])))
        for name, objective in chosen.items()
        for count in counts
    }
    panels = PANELS | {f"{order[0]} → {order[1]} alone": first_pair}
    this.write(
        {"order": order, "rows": rows},
        {f"{order}, mean of R@1, 5, 10, %": study.table(rows, panels, corner="objective, modalities")},
    )
    drawings.lines(
        {
            title: {name: (counts, [rows[f"{name}, {count}"][figure] for count in counts]) for name in chosen}
            for title, figure in panels.items()
        },
        this.folder / "recall.png",
        x="modalities",
        y="mean of R@1, 5, 10, %",
        columns=2,
    )


if __name__ == "__main__":
    study.main(run, __doc__)

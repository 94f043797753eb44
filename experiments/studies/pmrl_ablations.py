"""PMRL's ablations, the saturation of its alignment term, and what noise does to every objective.

`python -m experiments.studies.pmrl_ablations`. Terms left out; the temperature of the alignment term, with the mean
norm of its gradient, by which it saturates, in runs of pairwise InfoNCE, which align more and more; noise on one
modality's features at test, in units of their spread; and a share of the training vectors that are another item's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import drawings, measure, objectives, study
from experiments.studies.cells import Trained
from experiments.studies.families import PUBLISHED
from experiments.studies.features import FeatureSet
from gramjax import losses

ALIGNMENT_TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
NOISE = (0.0, 0.25, 0.5, 1.0, 2.0)
MISMATCHED = (0.0, 0.1, 0.2, 0.4)
OBJECTIVES = ("PMRL", "GRAM", "anchored InfoNCE", "pairwise InfoNCE", "GRAM + pairwise InfoNCE")
FIGURES = {
    "by leading direction": "recall by leading direction",
    "by residual": "recall by residual",
    "best score": "recall by best score",
    "pairs": "recall of pairs",
    "rank-one ratio": "rank-one ratio",
}


def run(options: study.Options) -> None:
    """All four parts."""
    this = study.Study("pmrl_ablations", options)
    chosen = {name: this.tuned(name, PUBLISHED[name]) for name in OBJECTIVES}
    temperature = chosen["PMRL"].objective[1].temperature
    ablated = ablations(this, temperature)
    swept = temperature_sweep(this, temperature)
    norms = gradient_norms(this)
    noisy = noise_at_test(this, chosen)
    mismatched = noise_in_training(this, chosen)
    this.write(
        {"ablations": ablated, "sweep": swept, "gradient norms": norms, "noise": noisy, "mismatched": mismatched},
        {
            "Terms left out, %": study.table(ablated, FIGURES, corner="terms"),
            "Temperature of the alignment term, %": study.table(swept, FIGURES, corner="temperature"),
            "Noise at test on one modality, best score, %": varied_table(noisy),
            "Share of the training vectors that are another item's, best score, %": varied_table(mismatched),
        },
    )
    drawings.lines(
        {"gradient of the alignment term": {name: study.curve(row) for name, row in norms.items()}},
        this.folder / "saturation.png", x="temperature", y="mean norm of an item's gradient", scale=1.0,
        logarithmic="xy",
    )  # fmt: skip
    drawings.lines(
        {
            title: {name: study.curve(row) for name, row in rows.items()}
            for title, rows in (("noise at test", noisy), ("wrong training vectors", mismatched))
        },
        this.folder / "noise.png", x=("noise, in spreads of the features", "share of the training vectors"),
        y="R@1, 5, 10, best score, %",
    )  # fmt: skip


def varied_table(rows):
    """A table whose columns are what was varied."""
    return study.table(rows, {name: name for name in next(iter(rows.values()))}, corner="objective")


def ablations(this: study.Study, temperature: float):
    """PMRL with each term left out."""
    align, apart, match = objectives.Alignment(0.05), objectives.Directions(temperature), objectives.Matching()
    parts = {
        "alignment + regularisation + matching": (align, apart, match),
        "without matching": (align, apart),
        "without regularisation": (align, match),
        "alignment alone": (align,),
        "regularisation alone": (apart,),
        "all, and pairwise InfoNCE": (align, apart, match, objectives.Pairwise(temperature)),
    }
    return {name: study.spreads(this.summaries(this.cell(objective))) for name, objective in parts.items()}


def temperature_sweep(this: study.Study, temperature: float):
    """PMRL over temperatures of its alignment term."""
    swept = {}
    for alignment in this.sweep(ALIGNMENT_TEMPERATURES):
        cell = this.cell((objectives.Alignment(alignment), objectives.Directions(temperature)))
        swept[f"{alignment:g}"] = study.spreads(this.summaries(cell))
    return swept


def gradient_norms(this: study.Study):
    """Size of the alignment term's gradient over its temperatures, early and late in a run that aligns well."""
    runs = this.over_seeds(this.cell((objectives.Pairwise(0.1),), snapshots=5))
    return {
        label: {
            f"{alignment:g}": study.spread([gradient_norm(this.features, one, snapshot, alignment) for one in runs])
            for alignment in ALIGNMENT_TEMPERATURES
        }
        for label, snapshot in (("after a fifth of the steps", 0), ("after three fifths", 2), ("at the end", 4))
    }


def gradient_norm(features: FeatureSet, trained: Trained, snapshot: int, temperature: float) -> float:
    """Mean over training items of the norm of the gradient of the alignment loss of the item."""
    train = {name: bank[:, 0] for name, bank in features.train.items()}
    z = jnp.stack([jnp.asarray(value) for value in trained.embed(train, snapshot=snapshot).values()], axis=1)
    gradient = jax.grad(lambda z: losses.alignment_loss(z, temperature=temperature, reduction="sum"))(z)
    return float(jnp.mean(jnp.sqrt(jnp.sum(jnp.square(gradient), axis=(1, 2)))))


def noise_at_test(this: study.Study, chosen):
    """Best recall of items, by the spread of the noise on the first modality that is not the anchor."""
    rows = {}
    for name, cell in chosen.items():
        first = next(modality for modality in cell.modalities if modality != cell.anchor)
        rows[name] = {}
        best = this.best_score(cell)
        for level in NOISE:
            recalls = []
            for trained in this.over_seeds(cell):
                rng = np.random.default_rng(trained.cell.seed)
                clean = this.features.test[first]
                noisy = clean + level * clean.std(axis=0) * rng.normal(size=clean.shape)
                embedded = trained.embed({**this.features.test, first: noisy.astype(np.float32)})
                recalls.append(measure.joint(embedded, cell.anchor, (best,))[best])
            rows[name][f"{level:g}"] = study.spread(recalls)
    return rows


def noise_in_training(this: study.Study, chosen):
    """Best recall of items, by the share of training vectors that are another item's."""
    rows = {}
    for name, cell in chosen.items():
        rows[name] = {}
        for share in this.sweep(MISMATCHED):
            runs = this.summaries(dataclasses.replace(cell, mismatched=share))
            rows[name][f"{share:g}"] = study.spread([one["recall by best score"] for one in runs])
    return rows


if __name__ == "__main__":
    study.main(run, __doc__)

"""What is not there: exact masks against filling up, in training and at test.

`python -m experiments.studies.missing_modalities`. In training a share of the vectors of every modality but the anchor
is missing, and the losses leave them out exactly (mask), or features of zero or the mean of the others stand in. At
test, items of a model trained on everything lack vectors, and are searched with what they have or with what stands in;
every item keeps one vector beside the anchor's, so that half of two at most are missing.
"""

import dataclasses

import numpy as np

from experiments.studies import drawings, measure, study
from experiments.studies.cells import Trained
from experiments.studies.families import CANDIDATES, PUBLISHED
from experiments.studies.features import FeatureSet

SHARES = (0.0, 0.3, 0.6, 0.9)
FILLS = ("mask", "zero", "mean")
OBJECTIVES = ("pairwise InfoNCE", "GRAM + pairwise InfoNCE", "PMRL", "cone")
SCORES = ("volume", "residual", "cone", "mean cosine", "leading direction")


def run(options: study.Options) -> None:
    """Train with missing vectors, search with missing vectors, write."""
    this = study.Study("missing_modalities", options)
    chosen = {name: this.tuned(name, (PUBLISHED | CANDIDATES)[name]) for name in OBJECTIVES}
    training, test = {}, {}
    shares = this.sweep(SHARES)
    for name, cell in chosen.items():
        for fill in FILLS:
            training[f"{name}, {fill}"] = {
                f"{share:g}": study.spread(
                    [
                        one["recall by best score"]
                        for one in this.summaries(
                            dataclasses.replace(cell, missing=share, fill=fill if share else "mask")
                        )
                    ]
                )
                for share in shares
            }
        runs = this.over_seeds(cell)
        left_out = this.sweep([share * (1 - 1 / (len(cell.modalities) - 1)) for share in SHARES])
        for fill in FILLS:
            for score in SCORES:
                test[f"{name}, {fill}, {score}"] = {
                    f"{missing:g}": study.spread(
                        [search(this.features, trained, share, fill, score) for trained in runs]
                    )
                    for share, missing in zip(shares, left_out)
                }
    columns = {f"{share:g}": f"{share:g}" for share in shares}
    this.write(
        {"training": training, "test": test},
        {
            "Share missing in training; the test split is complete, best score, %": study.table(
                training, columns, corner="objective, what stands in"
            ),
            "Share missing at test; trained on all, %": study.table(
                test, {name: name for name in next(iter(test.values()))}, corner="objective, what stands in, score"
            ),
        },
    )
    panels = {
        f"training, {name}": {fill: study.curve(training[f"{name}, {fill}"]) for fill in FILLS} for name in chosen
    }
    panels |= {
        f"test, by {score}, {name}": {fill: study.curve(test[f"{name}, {fill}, {score}"]) for fill in FILLS}
        for score in ("residual", "cone", "mean cosine")
        for name in chosen
    }
    drawings.lines(
        panels, this.folder / "recall.png", x="share missing", y="mean of R@1, 5, 10, %", columns=len(OBJECTIVES)
    )


def search(features: FeatureSet, trained: Trained, share: float, fill: str, score: str) -> float:
    """Mean recall on the test split where vectors are missing but one, chosen at random, of every item."""
    cell = trained.cell
    others = [name for name in cell.modalities if name != cell.anchor]
    rng = np.random.default_rng(cell.seed)
    items = len(features.test[cell.anchor])
    where = rng.random((items, len(others))) >= share
    where[np.arange(items), rng.integers(len(others), size=items)] = True
    inputs = dict(features.test)
    if fill != "mask":
        for column, name in enumerate(others):
            mean = features.train[name].mean(axis=(0, 1)) if fill == "mean" else 0.0
            inputs[name] = np.where(where[:, column, None], inputs[name], mean).astype(np.float32)
    embedded = trained.embed(inputs)
    gallery = np.stack([embedded[name] for name in others], axis=1)
    mask = where if fill == "mask" else None
    return measure.mean_recall(measure.ranks(measure.ITEM_SCORES[score], embedded[cell.anchor], gallery, mask))


if __name__ == "__main__":
    study.main(run, __doc__)

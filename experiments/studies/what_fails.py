"""What fails in volumes, and an answer: `python -m experiments.studies.what_fails`.

`Vol_ij^2 = D_j r_ij`: the item's own volume `D_j` multiplies all its scores. How much of that is in trained
embeddings: how skewed it is which items are found (hubness), recall of the half of the items whose own volume is small
and of the other half, and recall by how many modalities an item has, when every other item has one only, beside recall
of the same items when all have one, or all have all. Then every candidate that leaves out a fault, tuned as carefully
as the published objectives: sums with pairwise InfoNCE over a grid of both temperatures and the weight
(`families.apart`).

The best three of the published and of the others are compared at a second budget as well, of fewer and larger batches:
each is tuned again, among its five settings that were best at the first.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from experiments.studies import drawings, measure, study
from experiments.studies.cells import Trained
from experiments.studies.families import CANDIDATES, PUBLISHED
from experiments.studies.features import FeatureSet
from gramjax import linalg, metrics, scores

SCORES = ("volume", "residual", "cone", "mean cosine", "leading direction")
EXAMINED = ("GRAM", "GRAM + pairwise InfoNCE", "pairwise InfoNCE", "PMRL", "cone")
FIGURES = {f"by {name}": f"recall by {name}" for name in SCORES}
FIGURES |= {"best score": "recall by best score", "pairs": "recall of pairs"}
HEADLINE = {"items": "recall by best score", "pairs": "recall of pairs"}
HALVES = ("small own volume", "large own volume")
ARITIES = ("one among both", "one among ones", "all among both", "all among all")
OTHER_BUDGET = {"steps": 125, "batch_size": 1024}
FINALISTS, SETTINGS = 3, 5
Rows = Mapping[str, Mapping[str, Mapping]]


def run(options: study.Options) -> None:
    """Examine the published objectives, compare the candidates at both budgets, write."""
    this = study.Study("what_fails", options, seeds=5)
    examined = {}
    for name in EXAMINED:
        runs = this.over_seeds(this.tuned(name, (PUBLISHED | CANDIDATES)[name]))
        for score in SCORES:
            examined[f"{name}, {score}"] = study.spreads([examine(this.features, trained, score) for trained in runs])
    rows, searched = {}, {}
    for name, candidates in (PUBLISHED | CANDIDATES).items():
        if name != "TRIANGLE" or len(options.modalities) == 3:
            cell = this.tuned(name, candidates)
            rows[name] = study.spreads(this.summaries(cell))
            searched[name] = this.best_score(cell)
    ranked = sorted(rows, key=lambda name: this.validated[name][0][0], reverse=True)
    ours = next(name for name in ranked if name in CANDIDATES)
    finalists = [
        name for group in (PUBLISHED, CANDIDATES) for name in [*filter(group.__contains__, ranked)][:FINALISTS]
    ]
    budget = "{steps} × {batch_size}".format(**OTHER_BUDGET)
    again = {}
    for name in finalists:
        settings = [cell.objective for _, cell in this.validated[name][:SETTINGS]]
        again[name] = study.spreads(this.summaries(this.tuned(f"{name}, {budget}", settings, **OTHER_BUDGET)))
    margins, margins_again = (margins_of(ours, table) for table in (rows, again))
    this.write(
        {
            "examined": examined, "rows": rows, "best score": searched, f"rows at {budget}": again,
            f"margins of {ours}": margins, f"margins of {ours} at {budget}": margins_again,
        },
        {
            "Hubness (skewness of how often items are found)": study.table(
                examined, {"text finds items": "hubness"}, corner="objective, score", scale=1.0, digits=2
            ),
            "Recall from the anchor, by the half of the item's own volume, %": study.table(
                examined, {name: name for name in HALVES}, corner="objective, score"
            ),
            "Recall from the anchor of items of one modality or all, among items of one, all or both by turns, %": (
                study.table(examined, {name: name for name in ARITIES}, corner="objective, score")
            ),
            "Objectives, each tuned on validation, %": study.table(rows, FIGURES, corner="objective"),
            f"What {ours}, best of ours on validation, has more than each; over the same seeds, ± standard error, %": (
                margin_table(margins)
            ),
            f"{budget} items in place of 500 × 256, tuned again, %": study.table(again, FIGURES, corner="objective"),
            f"What {ours} has more than each at {budget}": margin_table(margins_again),
        },
    )  # fmt: skip
    series = {label: name for label, name in FIGURES.items() if label != "best score"}
    drawings.dots(
        {
            name: rows[name]
            for name in sorted(rows, key=lambda name: rows[name][HEADLINE["items"]]["mean"], reverse=True)
        },
        series,
        this.folder / "recall.png",
        title="What finds what, by objective",
        x="mean of R@1, 5, 10, %",
    )


def examine(features: FeatureSet, trained: Trained, name: str) -> dict[str, float]:
    """Hubness and recalls of parts of the test split, the anchor looking for items, by one score."""
    cell, score = trained.cell, measure.ITEM_SCORES[name]
    embedded = trained.embed(features.test)
    queries = embedded[cell.anchor]
    gallery = np.stack([value for modality, value in embedded.items() if modality != cell.anchor], axis=1)
    table = scores.score_matrix(score, jnp.asarray(queries), jnp.asarray(gallery))
    own = np.asarray(linalg.volume(jnp.asarray(gallery)))
    small = own <= np.median(own)
    number = np.arange(len(gallery))
    bare = number % 2 == 0
    ones = np.eye(gallery.shape[1], dtype=bool)[number // 2 % gallery.shape[1]]
    both = np.where(bare[:, None], ones, True)
    full, alone, mixed = (measure.ranks(score, queries, gallery, where)[0] for where in (None, ones, both))
    return {
        "hubness": float(metrics.hubness(table, higher_is_better=score.higher_is_better)),
        "small own volume": measure.mean_recall([full[small]]),
        "large own volume": measure.mean_recall([full[~small]]),
        "one among both": measure.mean_recall([mixed[bare]]),
        "one among ones": measure.mean_recall([alone[bare]]),
        "all among both": measure.mean_recall([mixed[~bare]]),
        "all among all": measure.mean_recall([full[~bare]]),
    }


def margins_of(ours: str, rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """`margin` of every other row, in items and in pairs."""
    return {
        name: {label: margin(rows[ours], row, figure) for label, figure in HEADLINE.items()}
        for name, row in rows.items()
        if ours in rows and name != ours
    }


def margin(ours: Mapping[str, Mapping], row: Mapping[str, Mapping], figure: str) -> dict[str, float]:
    """What ours has more over the same seeds, with the standard error of its mean."""
    difference = np.array(ours[figure]["values"]) - np.array(row[figure]["values"])
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return {"mean": float(difference.mean()), "standard error": float(error)}


def margin_table(margins: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Margins in per cent, the published objectives and then ours."""
    lines = ["| objective | " + " | ".join(HEADLINE) + " |", "| :-- |" + " --: |" * len(HEADLINE)]
    for name, row in margins.items():
        entries = [f"{100 * row[label]['mean']:+.1f} ± {100 * row[label]['standard error']:.1f}" for label in HEADLINE]
        lines.append(f"| {name} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    study.main(run, __doc__)

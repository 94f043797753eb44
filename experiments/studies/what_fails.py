"""What fails in volumes, and an answer: `python -m experiments.studies.what_fails`.

`Vol_ij^2 = D_j r_ij`: the item's own volume `D_j` multiplies all its scores. How much of that is in trained
embeddings: how skewed it is which items are found (hubness), recall of the half of the items whose own volume is small
and of the other half, and recall by how many modalities an item has, when every other item lacks one. Then every
candidate that leaves out a fault, tuned as carefully as the published objectives.
"""

import jax.numpy as jnp
import numpy as np

from experiments.studies import drawings, measure, study
from experiments.studies.cells import Trained
from experiments.studies.families import CANDIDATES, PUBLISHED
from gramjax import linalg, metrics, scores

SCORES = ("volume", "residual", "cone", "mean cosine", "leading direction")
EXAMINED = ("GRAM", "GRAM + pairwise InfoNCE", "pairwise InfoNCE", "PMRL")
FIGURES = {f"by {name}": f"recall by {name}" for name in SCORES}
FIGURES |= {"best score": "recall by best score", "pairs": "recall of pairs"}
PANELS = ("hubness", "small own volume", "large own volume", "one modality", "all modalities")


def run(options: study.Options) -> None:
    """Examine the published objectives, compare the candidates, write."""
    this = study.Study("what_fails", options, seeds=5)
    examined = {}
    for name in EXAMINED:
        runs = this.over_seeds(this.tuned(*PUBLISHED[name]))
        for score in SCORES:
            examined[f"{name}, {score}"] = study.spreads([examine(this, trained, score) for trained in runs])
    rows, settings, searched = {}, {}, {}
    for name, family in (PUBLISHED | CANDIDATES).items():
        if name != "TRIANGLE" or len(options.modalities) == 3:
            cell = this.tuned(*family)
            rows[name] = study.spreads(this.summaries(cell))
            settings[name] = str(cell.objective)
            searched[name] = this.best_score(cell)
    margins = {name: margin(row, rows, "recall by best score") for name, row in rows.items()}
    this.write(
        {"examined": examined, "rows": rows, "margins": margins, "tuned": settings, "best score": searched},
        {
            "Hubness (skewness of how often items are found)": study.table(
                examined, {"text finds items": "hubness"}, corner="objective, score", scale=1.0, digits=2
            ),
            "Recall from the anchor, by half and by number of modalities, %": study.table(
                examined, {name: name for name in PANELS[1:]}, corner="objective, score"
            ),
            "Objectives, each tuned on validation, %": study.table(rows, FIGURES, corner="objective"),
        },
    )
    series = {label: name for label, name in FIGURES.items() if label != "best score"}
    drawings.dots(
        rows, series, this.folder / "recall.png", title="What finds what, by objective", x="mean of R@1, 5, 10, %"
    )


def examine(this: study.Study, trained: Trained, name: str) -> dict[str, float]:
    """Hubness and recalls of parts of the test split, the anchor looking for items, by one score."""
    cell, score = trained.cell, measure.ITEM_SCORES[name]
    embedded = trained.embed(this.features.test)
    queries = embedded[cell.anchor]
    gallery = np.stack([value for modality, value in embedded.items() if modality != cell.anchor], axis=1)
    table = scores.score_matrix(score, jnp.asarray(queries), jnp.asarray(gallery))
    own = np.asarray(linalg.volume(jnp.asarray(gallery)))
    ranks, _ = measure.ranks(score, queries, gallery)
    small = own <= np.median(own)
    found = {
        "hubness": float(metrics.hubness(table, higher_is_better=score.higher_is_better)),
        "small own volume": measure.mean_recall([ranks[small]]),
        "large own volume": measure.mean_recall([ranks[~small]]),
    }
    where = np.ones(gallery.shape[:2], bool)
    bare = np.arange(len(where)) % 2 == 0
    where[bare] = np.eye(gallery.shape[1], dtype=bool)[np.arange(bare.sum()) % gallery.shape[1]]
    ranks, _ = measure.ranks(score, queries, gallery, where)
    return found | {
        "one modality": measure.mean_recall([ranks[bare]]),
        "all modalities": measure.mean_recall([ranks[~bare]]),
    }


def margin(row, rows, figure: str) -> dict[str, float]:
    """Difference to GRAM over seeds, with its standard error."""
    difference = np.array(row[figure]["values"]) - np.array(rows["GRAM"][figure]["values"])
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return {"mean": float(difference.mean()), "standard error": float(error)}


if __name__ == "__main__":
    study.main(run, __doc__)

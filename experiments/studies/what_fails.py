"""What fails in volumes, and an answer: `python -m experiments.studies.what_fails`.

`Vol_ij^2 = D_j r_ij`: the item's own volume `D_j` multiplies all its scores. How much of that is in trained
embeddings: how skewed it is which items are found (hubness), recall of the half of the items whose own volume is small
and of the other half, and recall by how many modalities an item has, when every other item has one only, beside recall
of the same items when all have one, or all have all. Then every candidate that leaves out a fault, tuned as carefully
as the published objectives: sums with pairwise InfoNCE over a grid of both temperatures and the weight
(`families.apart`).

The best on validation, three published and four others, are compared at a second budget as well, of fewer and larger
batches: each is tuned again, among its two settings that were best at the first.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from experiments.studies import drawings, measure, study
from experiments.studies.cells import Trained
from experiments.studies.families import CANDIDATES, PUBLISHED, Candidates
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
# Whose margins are told; how many of the published and of ours go on to the other budget, with how many settings.
OURS, FINALISTS, SETTINGS = 2, (3, 4), 2
Rows = Mapping[str, Mapping[str, Mapping]]


def run(options: study.Options) -> None:
    """Examine the published objectives, compare the candidates at both budgets, write."""
    this = study.Study("what_fails", options, seeds=5)
    examined = {}
    for name in EXAMINED:
        runs = this.over_seeds(this.tuned(name, (PUBLISHED | CANDIDATES)[name]))
        for score in SCORES:
            examined[f"{name}, {score}"] = study.spreads([examine(this.features, trained, score) for trained in runs])
    families = this.sweep([(name, (candidates, {})) for name, candidates in (PUBLISHED | CANDIDATES).items()])
    rows, searched = compared(this, dict(families))
    ranked = sorted(rows, key=lambda name: searched[name]["validation"], reverse=True)
    groups = [[name for name in ranked if name in group] for group in (PUBLISHED, CANDIDATES)]
    finalists = {
        name: ([cell.objective for _, cell in this.validated[name][:SETTINGS]], OTHER_BUDGET)
        for group, number in zip(groups, FINALISTS)
        for name in group[:number]
    }
    again, searched_again = compared(this, finalists)
    margins, margins_again = (margins_of(groups[1][:OURS], table) for table in (rows, again))
    budget = "{steps} × {batch_size}".format(**OTHER_BUDGET)
    this.write(
        {
            "examined": examined, "rows": rows, "best score": searched, "margins": margins,
            budget: {"rows": again, "best score": searched_again, "margins": margins_again},
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
            "By which score each is searched, the best on validation over all seeds": choice_table(searched),
            "What the best of ours on validation have more, of the same seeds, ± standard error, %": table_of(margins),
            f"{budget} items in place of 500 × 256, tuned again, %": study.table(again, FIGURES, corner="objective"),
            f"What the same have more at {budget}, %": table_of(margins_again),
        },
    )  # fmt: skip
    series = {label: name for label, name in FIGURES.items() if label != "best score"}
    best_first = sorted(rows, key=lambda name: rows[name][HEADLINE["items"]]["mean"], reverse=True)
    drawings.dots(
        {name: rows[name] for name in best_first}, series, this.folder / "recall.png",
        title="What finds what, by objective", x="mean of R@1, 5, 10, %",
    )  # fmt: skip


def compared(
    this: study.Study, families: Mapping[str, tuple[Candidates, Mapping[str, int]]]
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Figures of every objective, tuned under the settings beside it, and by which score it is searched.

    With the score comes the recall by it on validation, mean over all seeds: by two, as settings are tuned, an
    objective that is blind to sign may be lucky.
    """
    rows, searched = {}, {}
    for name, (candidates, settings) in families.items():
        if name != "TRIANGLE" or len(this.options.modalities) == 3:
            label = ", ".join([name, *(f"{value} {setting}" for setting, value in settings.items())])
            cell = this.tuned(label, candidates, **settings)
            rows[name] = study.spreads(this.summaries(cell))
            recalls = this.validation(cell)
            best = max(recalls, key=recalls.__getitem__)
            searched[name] = {"score": best, "validation": recalls[best]}
    return rows, searched


def choice_table(searched: Mapping[str, Mapping]) -> str:
    """What is searched by what, with the recall on validation."""
    lines = ["| objective | score | recall on validation, % |", "| :-- | :-- | --: |"]
    return "\n".join(
        [*lines, *(f"| {name} | {one['score']} | {100 * one['validation']:.1f} |" for name, one in searched.items())]
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


def margins_of(ours: Sequence[str], rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """`margin` of each of ours over every row, in items and in pairs."""
    return {
        name: {f"{one}: {label}": margin(rows[one], row, figure) for one in ours for label, figure in HEADLINE.items()}
        for name, row in rows.items()
    }


def margin(ours: Mapping[str, Mapping], row: Mapping[str, Mapping], figure: str) -> dict[str, float]:
    """What ours has more over the same seeds, with the standard error of its mean if there are several."""
    difference = np.array(ours[figure]["values"]) - np.array(row[figure]["values"])
    result = {"mean": float(difference.mean())}
    if len(difference) > 1:
        result["standard error"] = float(difference.std(ddof=1) / np.sqrt(len(difference)))
    return result


def table_of(margins: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Margins in per cent."""
    columns = [*next(iter(margins.values()))]
    lines = ["| than | " + " | ".join(columns) + " |", "| :-- |" + " --: |" * len(columns)]
    for name, row in margins.items():
        entries = [
            f"{100 * row[one]['mean']:+.1f}"
            + (f" ± {100 * row[one]['standard error']:.1f}" if "standard error" in row[one] else "")
            for one in columns
        ]
        lines.append(f"| {name} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    study.main(run, __doc__)

"""What an evaluation shows: the tables of `results.md` and the pictures."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import figures
from experiments.baseline import CUTOFFS, TOWERS
from gramjax import metrics, scores
from gramjax.data import emoji
from gramjax.training import read_metrics

GALLERY_WIDTH = 6
GALLERY_QUERIES = (4, 3, 3)


def markdown(results: Mapping[str, Any], drawn: Sequence[Path]) -> str:
    """`results.md`: what was evaluated, the tables, links to the pictures."""
    count = results["test_items"]
    pictures = "\n\n".join(f"![{path.stem}]({path.name})" for path in drawn)
    return f"""# {results["run"]}

{results["checkpoint"].capitalize()} checkpoint of seed {results["seed"]} on {count} test items, unseen
in training and validation (data {results["data_version"]}, jax {results["jax_version"]}).

{tables(results)}

## Pictures

{pictures}
"""


def tables(results: Mapping[str, Any]) -> str:
    """All figures as Markdown."""
    count = results["test_items"]
    chance = ", ".join(f"{100 * k / count:.1f}% at {k}" for k in CUTOFFS)
    return f"""## One modality asks, one answers

Cosine. Recall in per cent of {count} queries (chance: {chance}); ties count
against. The baseline is linear CCA on classical features; margins are model less baseline over the same queries, with
95% bootstrap intervals.

{pair_table(results)}

## One modality asks the item of all others, or is asked by it

{item_table(results)}

## Alignment

{alignment_table(results)}"""


def pair_table(results: Mapping[str, Any]) -> str:
    """Every modality against every other, the baseline and the margin beside it."""
    baseline = {(row["query"], row["answer"]): row for row in results["baseline"]}
    margins = {(row["query"], row["answer"]): row for row in results["margins"]}
    rows = []
    for row in results["pairs"]:
        key = row["query"], row["answer"]
        against = [_recalls(baseline[key]), f"{baseline[key]['median_rank']:g}"] if key in baseline else ["", ""]
        gains = [_gain(margins[key], k) for k in (1, 10)] if key in margins else ["", ""]
        rows.append([" → ".join(key), _recalls(row), f"{row['median_rank']:g}", *against, *gains])
    cutoffs = "R@" + " / ".join(map(str, CUTOFFS))
    header = [
        "query → answer",
        cutoffs,
        "median rank",
        f"CCA {cutoffs}",
        "CCA median rank",
        "margin R@1",
        "margin R@10",
    ]
    return table(header, rows)


def item_table(results: Mapping[str, Any]) -> str:
    """Each modality against all the others together, both ways, a column for each score."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in results["items"]:
        found.setdefault(f"{row['query']} → {row['answer']}", {})[row["score"]] = row
    names = list(next(iter(found.values())))
    rows = [[direction, *(_recalls(by_score[name]) for name in names)] for direction, by_score in found.items()]
    return table(["R@" + " / ".join(map(str, CUTOFFS)), *names], rows)


def alignment_table(results: Mapping[str, Any]) -> str:
    """How close and how spread the embeddings are."""
    measured = results["alignment"]
    rows = [
        ["1 - volume", f"{measured['gram_alignment']:.3f}"],
        ["rank-one ratio", f"{measured['rank_one_ratio']:.3f}"],
        *([f"modality gap, {pair}", f"{value:.3f}"] for pair, value in measured["modality_gap"].items()),
        *([f"uniformity, {name}", f"{value:.2f}"] for name, value in measured["uniformity"].items()),
    ]
    return table(["", "test items"], rows)


def draw(
    run_dir: Path, embeddings: Mapping[str, np.ndarray], labels: np.ndarray, results: Mapping[str, Any], source: Any
) -> list[Path]:
    """Writes the run's pictures; training curves only where the run has kept its metrics.

    Args:
      run_dir: where.
      embeddings: modality to `[N, dim]`, of the test split.
      labels: `[N]`, the items' categories.
      results: `evaluate.measure`'s, and "test_items".
      source: the test split's raw features, in the same order.
    """
    count = results["test_items"]
    names = list(embeddings)
    recall = np.full((len(names), len(names)), np.nan)
    for pair in results["pairs"]:
        recall[names.index(pair["query"]), names.index(pair["answer"])] = pair["recall@1"]
    drawn = [
        figures.retrieval_gallery(
            gallery(embeddings, source),
            run_dir / "gallery.png",
            title=f"Retrieval among {count} pictographs never seen in training",
            caption="Queries are evenly spaced through the test split, not picked by hand. "
            "Every item is shown by its picture, whatever was searched. The right one, if it is among them, is framed.",
        ),
        figures.recall_heatmap(
            recall, names, run_dir / "recall.png", title=f"Recall@1 in per cent, {count} test items"
        ),
        figures.embedding_map(embeddings, labels, emoji.CATEGORIES, run_dir / "embeddings.png"),
    ]
    records = read_metrics(run_dir)
    if len(records) > 1:
        drawn.append(figures.training_curves(records, run_dir / "curves.png"))
    return drawn


def gallery(embeddings: Mapping[str, np.ndarray], source: Any) -> dict[str, list[figures.GalleryRow]]:
    """Three directions at most, those with pictures first; queries evenly spaced through the split."""
    shown = next((name for name in embeddings if TOWERS[name] == "vision"), "twitter")
    directions = sorted(
        itertools.permutations(embeddings, 2),
        key=lambda pair: (TOWERS[pair[1]] != "vision", TOWERS[pair[0]] != "vision"),
    )

    def found(item: int, right: bool = False) -> figures.Found:
        return figures.Found(_picture(source[item], shown), source[item]["english"]["name"], right)

    sections = {}
    for (query, answer), wanted in zip(directions, GALLERY_QUERIES):
        table = scores.cosine_scores(jnp.asarray(embeddings[query]), jnp.asarray(embeddings[answer])[:, None])
        ranks = np.asarray(metrics.retrieval_ranks(table, higher_is_better=True))
        best = np.argsort(-np.asarray(table), axis=1, kind="stable")[:, :GALLERY_WIDTH]
        sections[f"{query} → {answer}"] = [
            figures.GalleryRow(
                query=_shown_query(source[item], query),
                name=source[item]["english"]["name"],
                found=[found(other, other == item) for other in best[item]],
                answer=found(item),
                rank=int(ranks[item]) + 1,
            )
            for item in map(int, figures.evenly_spaced(len(ranks), wanted))
        ]
    return sections


def _shown_query(example: Mapping[str, Any], modality: str) -> str | np.ndarray:
    if TOWERS[modality] == "vision":
        return _picture(example, modality)
    if TOWERS[modality] == "audio":
        return example[modality][emoji.TEST_VOICE] / 2**15
    words, english = (
        f"{example[name]['name']}: {', '.join(example[name]['keywords'])}" for name in (modality, "english")
    )
    return figures.drawable(words, fallback=english)


def _picture(example: Mapping[str, Any], artist: str) -> np.ndarray:
    return emoji.decode_picture(example[artist]).astype(np.float32) / 255


def _recalls(row: Mapping[str, Any]) -> str:
    return " / ".join(f"{100 * row[f'recall@{k}']:.1f}" for k in CUTOFFS)


def _gain(row: Mapping[str, Any], k: int) -> str:
    low, high = row[f"recall@{k}_interval"]
    return f"{100 * row[f'recall@{k}']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)

"""Classes from frozen embeddings: by a linear map, and from the classes' names alone; and how classes lie.

`python -m experiments.studies.classification`. The linear map is a ridge regression to one-hot classes whose ridge
validation chooses; the same of the features that the embeddings are made of stands beside it. Zero-shot, the class
whose name's embedding scores best. Accuracy is balanced: the mean over classes of the share of its items that are
recognised. Features need labels, and for zero-shot the classes' names.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from experiments.config import ConfigError
from experiments.studies import drawings, measure, study
from experiments.studies.families import PUBLISHED
from gramjax import scores
from gramjax.data import emoji

OBJECTIVES = ("GRAM", "PMRL", "GRAM + pairwise InfoNCE", "anchored InfoNCE", "pairwise InfoNCE", "sigmoid")
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def run(options: study.Options) -> None:
    """Embed every split, classify, write."""
    this = study.Study("classification", options)
    labels, classes = this.features.labels, this.features.classes
    if set(labels) < {"train", "validation", "test"}:
        raise ConfigError(f"features must have labels of every split for classification, got them of {sorted(labels)}")
    splits = {
        "train": {name: bank[:, 0] for name, bank in this.features.train.items()},
        "validation": this.features.validation,
        "test": this.features.test,
    }
    used = {split: {name: part[name] for name in options.modalities} for split, part in splits.items()}
    rows, maps = {"the features themselves": study.spreads([linear_probes(used, labels)])}, {}
    for name in OBJECTIVES:
        found, cosines = [], []
        for trained in this.over_seeds(this.tuned(name, PUBLISHED[name])):
            embedded = {split: trained.embed(part) for split, part in splits.items()}
            results = linear_probes(embedded, labels)
            if options.anchor in classes:
                names = trained.embed(classes, only=(options.anchor,))[options.anchor]
                results |= zero_shot(names, embedded["test"], labels["test"], options.anchor)
            found.append(results)
            cosines.append(class_cosines(embedded["test"], labels["test"]))
        rows[name] = study.spreads(found)
        maps[name] = 100 * np.mean(cosines, axis=0)
    chance = 1 / len(np.unique(labels["train"]))
    this.write(
        {"rows": rows, "class cosines": {name: matrix.tolist() for name, matrix in maps.items()}, "chance": chance},
        {
            f"Balanced accuracy, %; chance is {100 * chance:.1f}": study.table(
                rows, {figure: figure for figure in rows[OBJECTIVES[0]]}, corner="objective"
            )
        },
    )
    present = np.unique(labels["test"])
    names = [emoji.CATEGORIES[label] if options.features is None else str(label) for label in present]
    drawings.heat_maps(maps, names, this.folder / "classes.png", y="class", x="class")


def balanced_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes there are of the share that is recognised."""
    return float(np.mean([np.mean(predicted[labels == label] == label) for label in np.unique(labels)]))


def linear_probe(embedded: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> float:
    """Balanced accuracy on test of a ridge regression to one-hot classes, its ridge chosen on validation."""
    mean = embedded["train"].mean(axis=0)
    x = (embedded["train"] - mean).astype(np.float64)
    number = max(int(part.max()) for part in labels.values()) + 1
    counts = np.maximum(np.bincount(labels["train"], minlength=number), 1)
    target = np.eye(number)[labels["train"]]
    weights = 1 / counts[labels["train"]]  # every class counts the same
    centre = (weights[:, None] * target).sum(0) / weights.sum()
    best = (-1.0, 0.0)
    for ridge in RIDGES:
        gram = (weights[:, None] * x).T @ x
        gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        map_ = np.linalg.solve(gram, (weights[:, None] * x).T @ (target - centre))
        scored = {split: (part - mean) @ map_ + centre for split, part in embedded.items() if split != "train"}
        accuracy = {split: balanced_accuracy(part.argmax(1), labels[split]) for split, part in scored.items()}
        best = max(best, (accuracy["validation"], accuracy["test"]))
    return best[1]


def linear_probes(
    embedded: Mapping[str, Mapping[str, np.ndarray]], labels: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """`linear_probe` of every modality, and of all side by side."""
    modalities = list(embedded["train"])
    found = {
        f"linear, {modality}": linear_probe({split: part[modality] for split, part in embedded.items()}, labels)
        for modality in modalities
    }
    joined = {split: np.concatenate([*part.values()], axis=1) for split, part in embedded.items()}
    return found | {"linear, all": linear_probe(joined, labels)}


def zero_shot(
    names: np.ndarray, embedded: Mapping[str, np.ndarray], labels: np.ndarray, anchor: str
) -> dict[str, float]:
    """Balanced accuracy of the class whose name scores best, for every modality and for the item of all."""
    others = [name for name in embedded if name != anchor]
    galleries = {name: embedded[name][:, None] for name in others}
    galleries["all"] = np.stack([embedded[name] for name in others], axis=1)
    found = {}
    for what, gallery in galleries.items():
        for label in ("residual", "mean cosine") if what == "all" else ("mean cosine",):
            score = measure.ITEM_SCORES[label]
            table = np.asarray(scores.score_matrix(score, jnp.asarray(names), jnp.asarray(gallery)))
            predicted = (table if score.higher_is_better else -table).argmax(axis=0)
            heading = f"zero-shot, {what}" + (f" by {label}" if what == "all" else "")
            found[heading] = balanced_accuracy(predicted, labels)
    return found


def class_cosines(embedded: Mapping[str, np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Mean cosine between different items of every two classes, over all modalities: how classes are disentangled.

    Less the mean over all classes, which tells how narrow a cone all embeddings lie in. NaN where there are no items.
    """
    z = np.concatenate([*embedded.values()], axis=0)
    item = np.tile(np.arange(len(labels)), len(embedded))
    of = np.tile(labels, len(embedded))
    cosines, different = z @ z.T, item[:, None] != item[None, :]
    classes = np.unique(labels)
    matrix = np.empty((len(classes), len(classes)))
    for a, b in np.ndindex(matrix.shape):
        chosen = np.ix_(of == classes[a], of == classes[b])
        matrix[a, b] = cosines[chosen][different[chosen]].mean() if different[chosen].any() else np.nan
    return matrix - np.nanmean(matrix)


if __name__ == "__main__":
    study.main(run, __doc__)

"""Autism or control? Cross-validated on ABIDE: `python -m experiments.classify_abide ABIDE_pcp`.

The connectivity of each atlas is a modality. For each fold a model aligns them by the chosen objective on the training
subjects, without their diagnoses unless `--supervision` says so; then a logistic regression on its frozen embeddings
(the probe) learns to tell the diagnosis, and does so for the test subjects. Beside it stands the same logistic
regression on the connectivity itself, in the same folds. Whatever is fitted (mean and deviation of every feature, the
model, the penalty of the regressions) is fitted to the training subjects of the fold alone.

Everything goes to `--run-dir`: results.json with every subject's probabilities, results.md with the tables. Folds that
are done are kept there; started again with other options, those that they do not change are not computed again.

PMRL (arXiv 2507.17343) reports such a classification, but its published code does not contain it, so atlases, encoders
and protocols are not claimed to be its own. The protocols are those common on ABIDE: leave one institution out (the
samples of UCLA, and those of Leuven and of Michigan, together), and folds that share site and diagnosis evenly.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from experiments import classification, objective, runs
from experiments.classification import METRICS
from experiments.config import (
    PMRL,
    ConfigError,
    Contrastive,
    Objective,
    Optimizer,
    check_objective,
    check_ranges,
    has_terms,
)
from gramjax import losses
from gramjax.data import abide
from gramjax.encoders import VectorConfig
from gramjax.models import GramConfig, GramModel, to_json
from gramjax.training import create_train_state, make_train_step, merge

PMRL_ALONE = Objective(pmrl=PMRL(weight=1.0), pairwise_infonce=Contrastive(temperature=0.15))
SHORT = Optimizer(warmup_steps=20)
Protocol = Literal["leave-one-site-out", "k-fold"]


@dataclasses.dataclass(frozen=True)
class Classify:
    """Classify the subjects of ABIDE from their connectivity in several atlases."""

    data: tyro.conf.Positional[Path]
    """Folder with Phenotypic_V1_0b_preprocessed1.csv and the time series."""
    run_dir: Path = Path("runs/abide")
    """Where results and finished folds are."""
    atlases: tuple[abide.Atlas, ...] = ("aal", "cc200", "dosenbach160")
    phenotype: bool = False
    """Age, sex and IQ as one more modality. What is gained by it says nothing of the brain."""
    anchor: str | None = None
    """The modality that anchored terms compare with the others; by default the first atlas."""
    pipeline: abide.Pipeline = "cpac"
    strategy: abide.Strategy = "filt_noglobal"
    quality_checked: bool = True
    """Without the subjects that a rater refused."""
    protocols: tuple[Protocol, ...] = ("leave-one-site-out", "k-fold")
    folds: int = 10
    """Of k-fold cross-validation."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is all folds once more, with other initial values and other batches; k-fold also with other folds."""
    objective: Objective = PMRL_ALONE
    supervision: float = 0.0
    """Weight of the diagnosis (cross-entropy of a linear head on the embeddings) in what is minimised; the head's own
    predictions are then reported as well."""
    steps: int = 200
    batch_size: int = 128
    embed_dim: int = 64
    width: int = 128
    """Of each atlas's encoder."""
    depth: int = 1
    """Residual blocks of each encoder."""
    input_dropout_rate: float = 0.5
    dropout_rate: float = 0.3
    optimizer: Optimizer = SHORT

    def __post_init__(self):
        modalities = modalities_of(self)
        for name in ("atlases", "protocols", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different ones, at least one, got {values}")
        if len(modalities) < 2:
            raise ValueError(f"atlases must be two or more, or one and --phenotype, got {self.atlases}")
        if self.anchor not in (None, *modalities):
            raise ValueError(f"anchor must be one of {modalities}, got {self.anchor!r}")
        check_ranges(self)
        check_objective(self.objective, modalities)
        if not 0 <= self.supervision < float("inf"):
            raise ValueError(f"supervision must be finite and not negative, got {self.supervision}")
        if not has_terms(self.objective) and not self.supervision:
            raise ValueError("objective has no term: give at least one a weight, such as --objective.gram.weight 1")
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, got {self.folds}")
        if any(not 0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"seeds must be in [0, 2**32), got {self.seeds}")
        warmup_steps = self.optimizer.warmup(self.steps)
        if not warmup_steps < self.steps:
            raise ValueError(f"optimizer.warmup_steps must be below steps = {self.steps}, got {warmup_steps}")
        tower_config(self, features=1)


class Fold(NamedTuple):
    protocol: str
    seed: int
    name: str
    train: np.ndarray
    """[subjects] bool."""


def modalities_of(config: Classify) -> tuple[str, ...]:
    return (*config.atlases, *(("phenotype",) if config.phenotype else ()))


def tower_config(config: Classify, features: int) -> VectorConfig:
    return VectorConfig(
        features=features,
        width=config.width,
        depth=config.depth,
        mlp_dim=2 * config.width,
        input_dropout_rate=config.input_dropout_rate,
        dropout_rate=config.dropout_rate,
    )


class Classifier(nnx.Module):
    """Embeddings of every modality, and the logits (control, autism) that a linear head makes of them together."""

    def __init__(self, config: GramConfig, *, rngs: nnx.Rngs):
        self.model = GramModel(config, rngs=rngs)
        self.head = nnx.Linear(len(config.modalities) * config.embed_dim, 2, rngs=rngs)

    def __call__(self, features: Mapping[str, jax.Array], where: Mapping[str, jax.Array], rngs: nnx.Rngs | None = None):
        embeddings = self.model.embed(features, rngs=rngs)
        present = [jax.numpy.where(where[name][:, None], z, 0.0) for name, z in embeddings.items()]
        return embeddings, self.head(jax.numpy.concatenate(present, axis=1))


class Trainer:
    """Trains models of one configuration on different subjects; everything is compiled once."""

    def __init__(self, config: Classify, sizes: Mapping[str, int]):
        towers = {name: tower_config(config, size) for name, size in sizes.items()}
        model = GramConfig(towers, {name: name for name in towers}, embed_dim=config.embed_dim)
        optimizer = runs.make_optimizer(config)

        def start(key: jax.Array):
            classifier = Classifier(model, rngs=nnx.Rngs(key))
            graphdef, state = create_train_state(classifier, objective.parameters(config.objective), optimizer)
            return graphdef, dataclasses.replace(state, rng=key)

        self._start = jax.jit(start)
        self._graphdef, _ = jax.eval_shape(start, jax.random.key(0))
        self._step = make_train_step(self._graphdef, optimizer, _loss(config))
        self._forward = jax.jit(lambda state, features, where: merge(self._graphdef, state)[0](features, where))
        self._config = config

    def __call__(
        self,
        features: Mapping[str, np.ndarray],
        where: Mapping[str, np.ndarray],
        labels: np.ndarray,
        train: np.ndarray,
        seed: int,
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Train on some of the subjects, then embed all.

        Args:
            features: modality -> [subjects, features], finite.
            where: modality -> [subjects] bool.
            labels: [subjects].
            train: indices of those to train on.
            seed: of initial values, batches and dropout.

        Returns:
            modality -> unit vectors [subjects, embed_dim], and the head's logits [subjects, 2].
        """
        _, state = self._start(jax.random.key(seed))
        for rows in _batches(train, self._config.batch_size, self._config.steps, seed):
            batch = {
                "features": {name: values[rows] for name, values in features.items()},
                "where": {name: there[rows] for name, there in where.items()},
                "label": labels[rows],
                "index": rows.astype(np.int32),
            }
            state, metrics = self._step(state, batch)
        if not np.isfinite(metrics["loss"]):
            raise ConfigError(f"the loss is {metrics['loss']}: the run has diverged; lower --optimizer.learning-rate")
        return jax.device_get(self._forward(state, dict(features), dict(where)))


def _loss(config: Classify):
    def loss(classifier: Any, scalars: Any, batch: Any, rngs: nnx.Rngs):
        embeddings, logits = classifier(batch["features"], batch["where"], rngs)
        total, terms = jax.numpy.zeros(()), {}
        if has_terms(config.objective):
            total, terms = objective.loss(
                config.objective,
                embeddings,
                scalars,
                anchor=config.anchor or config.atlases[0],
                ids=batch["index"],
                key=rngs.negatives(),
                where=batch["where"],
            )
        if config.supervision:
            terms["loss/supervision"] = losses.matching_loss(logits, batch["label"])
            total = total + config.supervision * terms["loss/supervision"]
        return total, terms

    return loss


def _batches(train: np.ndarray, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Whole batches of shuffled rows, epoch after epoch."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        position = step % (len(train) // size)
        if position == 0:
            order = rng.permutation(train)
        yield order[position * size : (position + 1) * size]


def make_folds(config: Classify, data: abide.Abide) -> list[Fold]:
    """All folds of all protocols and seeds.

    Raises:
        ConfigError: there is one institution, one diagnosis in all subjects or in those that a fold trains on, or there
            are too few subjects.
    """
    if len(set(data.labels.tolist())) < 2:
        raise ConfigError("data must have subjects of both diagnoses")
    institutions = np.array([abide.institution(site) for site in data.sites])
    if "leave-one-site-out" in config.protocols and len(set(institutions)) < 2:
        raise ConfigError(f"leave-one-site-out needs two institutions or more, got {', '.join(set(institutions))}")
    if "k-fold" in config.protocols and config.folds > len(data.subjects):
        raise ConfigError(f"folds must not exceed the {len(data.subjects)} subjects, got {config.folds}")
    folds = []
    for protocol in config.protocols:
        for seed in config.seeds:
            if protocol == "leave-one-site-out":
                groups, names = institutions, sorted(set(institutions))
            else:
                groups = classification.stratified_folds(strata(data), config.folds, seed=seed)
                names = list(range(config.folds))
            folds += [Fold(protocol, seed, str(name), groups != name) for name in names]
    for fold in folds:
        if len(set(data.labels[fold.train].tolist())) < 2:
            raise ConfigError(
                f"data must have training subjects of both diagnoses: without {fold.name} ({fold.protocol}) it has one"
            )
    if config.batch_size > (smallest := min(int(fold.train.sum()) for fold in folds)):
        raise ConfigError(f"batch_size must not exceed the {smallest} training subjects of the smallest fold")
    return folds


def strata(data: abide.Abide) -> list[tuple[str, int]]:
    """Site and diagnosis of every subject."""
    return list(zip(data.sites.tolist(), data.labels.tolist()))


def run_fold(trainer: Trainer, config: Classify, data: abide.Abide, fold: Fold) -> dict[str, Any]:
    """Train and test one fold: who was tested, and probabilities and metrics of every method."""
    labels, groups, train = data.labels, strata(data), np.flatnonzero(fold.train)
    test = np.flatnonzero(~fold.train)

    def regression(features: Sequence[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(features, axis=1)
        inner = [groups[row] for row in train]
        return classification.predict(joined[train], labels[train], joined[test], strata=inner, seed=fold.seed)[0]

    features = {name: abide.standardize(values, train) for name, values in data.features.items()}
    embeddings, logits = trainer(features, data.where, labels, train, fold.seed)
    # To the probe, too, an absent modality is one of which nothing is known.
    masked = [np.where(data.where[name][:, None], z, np.nan) for name, z in embeddings.items()]
    probabilities = {
        "baseline": regression(list(features.values())),
        "probe": regression([abide.standardize(z, train) for z in masked]),
    }
    if config.supervision:
        probabilities["head"] = 1 / (1 + np.exp(logits[test, 0] - logits[test, 1]))
    return {
        "protocol": fold.protocol,
        "seed": fold.seed,
        "fold": fold.name,
        "train_subjects": len(train),
        "test_subjects": [data.subjects[row].id for row in test],
        "labels": labels[test].tolist(),
        "methods": {
            name: {**classification.measure(labels[test], p), "probabilities": np.round(p, 5).tolist()}
            for name, p in probabilities.items()
        },
    }


def run(config: Classify, data: abide.Abide) -> list[dict[str, Any]]:
    """All folds; those of earlier runs with the same options and data are read back."""
    folds = make_folds(config, data)
    trainer = Trainer(config, {name: values.shape[1] for name, values in data.features.items()})
    cache = config.run_dir / "folds"
    cache.mkdir(parents=True, exist_ok=True)
    common = _fingerprint(config, data)
    results = []
    for fold in tqdm(folds, disable=None):
        key = hashlib.sha256(common + fold.train.tobytes() + f"{fold.protocol} {fold.seed}".encode()).hexdigest()[:20]
        path = cache / f"{key}.json"
        if not path.exists():
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(run_fold(trainer, config, data, fold)), encoding="utf-8")
            partial.replace(path)
        try:
            results.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is damaged; remove it, and its fold is done again ({error})") from error
    return results


def _fingerprint(config: Classify, data: abide.Abide) -> bytes:
    """Of all that a fold's result depends on, but for the fold."""
    chosen = {name: value for name, value in to_json(config).items() if name not in _NOT_OF_A_FOLD}
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode())
    for name, values in data.features.items():
        digest.update(f"{name} {values.shape}".encode() + np.ascontiguousarray(values).tobytes())
    digest.update(repr([(subject.id, subject.site, subject.autism) for subject in data.subjects]).encode())
    return digest.digest()


_NOT_OF_A_FOLD = ("data", "run_dir", "protocols", "folds", "seeds")


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Protocol -> method, or "method - baseline" -> metric -> mean and standard deviation over its folds.

    A fold where a metric is not defined (a site of one diagnosis has no AUC) does not count for it; "folds" says how
    many do.
    """
    summary: dict[str, dict[str, Any]] = {}
    for protocol in dict.fromkeys(result["protocol"] for result in results):
        folds = [result["methods"] for result in results if result["protocol"] == protocol]
        table = {
            name: {metric: _spread([fold[name][metric] for fold in folds]) for metric in METRICS} for name in folds[0]
        }
        for name in [name for name in table if name != "baseline"]:
            table[f"{name} - baseline"] = {
                metric: _spread([_difference(fold[name][metric], fold["baseline"][metric]) for fold in folds])
                for metric in METRICS
            }
        summary[protocol] = table
    return summary


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    defined = np.array([value for value in values if value is not None])
    return {
        "mean": float(defined.mean()) if len(defined) else None,
        "std": float(defined.std(ddof=1)) if len(defined) > 1 else None,
        "folds": len(defined),
    }


LABELS = {
    "baseline": "logistic regression on connectivity",
    "probe": "logistic regression on embeddings",
    "head": "supervised head",
    "probe - baseline": "embeddings less connectivity",
    "head - baseline": "head less connectivity",
}


def markdown(results: Sequence[Mapping[str, Any]], summary: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each protocol, in per cent."""
    parts = []
    for protocol, table in summary.items():
        folds = [result for result in results if result["protocol"] == protocol]
        seeds = len({result["seed"] for result in folds})
        count = f"{len(folds) // seeds} folds x {seeds} seed{'s' if seeds > 1 else ''}"
        parts += [f"{protocol}: per cent, mean ± standard deviation over {count}", ""]
        parts += ["| | " + " | ".join(METRICS) + " |", "| :-- |" + " --: |" * len(METRICS)]
        for name, row in table.items():
            cells = [_cell(row[metric], signed=" - " in name) for metric in METRICS]
            parts.append(f"| {LABELS[name]} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _cell(spread: Mapping[str, Any], *, signed: bool) -> str:
    if spread["mean"] is None:
        return "-"
    mean = f"{100 * spread['mean']:{'+' if signed else ''}.1f}"
    return mean if spread["std"] is None else f"{mean} ± {100 * spread['std']:.1f}"


def read(config: Classify) -> abide.Abide:
    """The data of a configuration."""
    return abide.read(
        config.data,
        atlases=config.atlases,
        pipeline=config.pipeline,
        strategy=config.strategy,
        quality_checked=config.quality_checked,
        phenotype=config.phenotype,
    )


def classify(config: Classify, data: abide.Abide) -> str:
    """Cross-validate and write results.json and results.md, whose text is returned."""
    results = run(config, data)
    summary = summarize(results)
    tables = markdown(results, summary)
    written = {
        "config": to_json(config),
        "jax_version": jax.__version__,
        "data": {
            "subjects": len(data.subjects),
            "autism": int(data.labels.sum()),
            "sites": sorted(set(data.sites.tolist())),
            "lacking": {name: int((~there).sum()) for name, there in data.where.items()},
            "left_out": {reason: list(ids) for reason, ids in data.left_out.items()},
        },
        "summary": summary,
        "folds": results,
    }
    (config.run_dir / "results.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    (config.run_dir / "results.md").write_text(tables, encoding="utf-8")
    return tables


def main() -> None:
    """Read, cross-validate and print, as the command line says."""
    try:
        config = tyro.cli(Classify, description=__doc__)
        data = read(config)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(data.summary(), flush=True)
    try:
        tables = classify(config, data)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with the fold it was at")
    print(f"\n{tables}\nWritten: {config.run_dir / 'results.json'}")


if __name__ == "__main__":
    main()

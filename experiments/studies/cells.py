"""A cell: one short training run on frozen features, kept by its configuration.

Each modality has a small tower of its own, a linear map plus a hidden layer; what is compared is everything else: the
objective, the modalities, what is missing, the batch. A cell takes seconds on one core, so that a study can afford its
temperatures and its seeds.
"""

import dataclasses
import functools
import hashlib
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from experiments.studies import objectives
from experiments.studies.features import FeatureSet
from experiments.studies.objectives import Objective
from gramjax.training import TrainState, adamw, create_train_state, make_train_step

# Counts up when a cell trains differently: cells kept from before are then no longer found.
REVISION = 1
WHERE = "where"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run on frozen features. What is not named is the same in every study."""

    objective: Objective
    modalities: tuple[str, ...] = ("english", "twitter", "speech")
    anchor: str = "english"
    """The modality that anchored terms compare with the others."""
    seed: int = 0
    steps: int = 500
    batch_size: int = 256
    embed_dim: int = 256
    hidden: int = 256
    dropout: float = 0.5
    """Of the features and of the hidden layer."""
    learning_rate: float = 2e-3
    weight_decay: float = 1.0
    missing: float = 0.0
    """Share of the training vectors, of all modalities but the anchor, that are not there. Which, is fixed once."""
    fill: Literal["mask", "zero", "mean"] = "mask"
    """What stands for a missing vector: nothing (the losses' exact mask), features of 0, or the features' mean over
    the items that have the modality."""
    mismatched: float = 0.0
    """Share of the training vectors, of every modality but the anchor by itself, that are another item's."""
    snapshots: int = 1
    """How many times along the run the towers are kept, evenly spaced, the end included."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is kept of a cell: its towers at every snapshot."""

    cell: Cell
    towers: Sequence[Mapping[str, Mapping[str, np.ndarray]]]

    def embed(
        self, features: Mapping[str, np.ndarray], *, snapshot: int = -1, only: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Unit vectors float32 `[items, embed_dim]` of every modality, or some, from features `[items, width]`."""
        return {
            name: np.asarray(_project(self.towers[snapshot][name], jnp.asarray(features[name])))
            for name in (self.cell.modalities if only is None else only)
        }


class Tower(nnx.Module):
    """A linear map plus a hidden layer, to unit vectors."""

    def __init__(self, width: int, cell: Cell, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(width, cell.embed_dim, use_bias=False, rngs=rngs)
        self.hidden = nnx.Linear(width, cell.hidden, rngs=rngs)
        self.out = nnx.Linear(cell.hidden, cell.embed_dim, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(cell.dropout)

    def __call__(self, x: Float[Array, "batch width"], rngs: nnx.Rngs) -> Float[Array, "batch dim"]:
        x = self.dropout(x, rngs=rngs)
        return _unit(self.linear(x) + self.out(self.dropout(jax.nn.gelu(self.hidden(x)), rngs=rngs)))


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


@jax.jit
def _project(tower: Mapping[str, Array], x: Array) -> Array:
    """What `Tower` computes, without dropout, from its kept parameters."""
    hidden = jax.nn.gelu(x @ tower["hidden/kernel"] + tower["hidden/bias"][None])
    return _unit(x @ tower["linear/kernel"] + hidden @ tower["out/kernel"])


def load_or_train(cells: Sequence[Cell], features: FeatureSet, folder: Path) -> list[Trained]:
    """Every cell, from `folder` if it was trained before.

    Args:
      cells: what to train.
      features: on what.
      folder: where cells are kept; several processes may train into it at once.
    """
    trained = []
    for number, cell in enumerate(cells):
        path = folder / f"{fingerprint(cell, features)}.npz"
        found = _load(cell, path) if path.exists() else None
        if found is None:
            print(f"cell {number + 1} of {len(cells)}: {describe(cell)}", flush=True)
            found = train(cell, features)
            _save(found, path)
        trained.append(found)
    return trained


def fingerprint(cell: Cell, features: FeatureSet) -> str:
    """Name under which a cell is kept."""
    # `repr` names the classes of the terms, which `asdict` would drop.
    record = json.dumps([REVISION, repr(cell), features.fingerprint])
    return hashlib.sha256(record.encode()).hexdigest()[:20]


def describe(cell: Cell) -> str:
    """What tells a cell from others, in a line."""
    return ", ".join(
        [
            objectives.describe(cell.objective),
            *(
                f"{field.name} {getattr(cell, field.name)}"
                for field in dataclasses.fields(cell)
                if field.name != "objective" and getattr(cell, field.name) != field.default
            ),
        ]
    )


def train(cell: Cell, features: FeatureSet) -> Trained:
    """Train a cell from the start."""
    rng = np.random.default_rng([cell.seed, 1])
    banks, where = training_arrays(cell, features, np.random.default_rng([cell.seed, 2]))
    widths = tuple(bank.shape[-1] for bank in banks.values())
    step_fn = _compiled(dataclasses.replace(cell, seed=0), widths)
    state = _start(cell, widths)
    banks = jax.tree.map(jnp.asarray, banks)
    items = len(where)
    order, towers = np.empty(0, np.int64), []
    marks = {round(cell.steps * (number + 1) / cell.snapshots) for number in range(cell.snapshots)}
    batch_size = min(cell.batch_size, items)
    for step in range(1, cell.steps + 1):
        if len(order) < batch_size:
            order = rng.permutation(items)
        rows, order = order[:batch_size], order[batch_size:]
        copies = {name: rng.integers(bank.shape[1], size=batch_size) for name, bank in banks.items()}
        batch = {"banks": banks, "rows": rows, "copies": copies, WHERE: where[rows]}
        state, _ = step_fn(state, batch)
        if step in marks:
            towers.append(_parameters(state))
    return Trained(cell, towers)


def training_arrays(
    cell: Cell, features: FeatureSet, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], Bool[np.ndarray, "items modality"]]:
    """The training features with what is missing and mismatched, and which vectors the losses see."""
    banks = {name: features.train[name] for name in cell.modalities}
    items = len(banks[cell.anchor])
    where = np.ones((items, len(banks)), bool)
    for column, name in enumerate(banks):
        if name == cell.anchor:
            continue
        if cell.mismatched:
            moved = np.flatnonzero(rng.random(items) < cell.mismatched)
            banks[name] = banks[name].copy()
            banks[name][moved] = banks[name][np.roll(moved, 1)]
        if cell.missing:
            absent = rng.random(items) < cell.missing
            if cell.fill == "mask":
                where[:, column] = ~absent
            else:
                mean = banks[name][~absent].mean(axis=(0, 1))
                banks[name] = np.where(absent[:, None, None], mean if cell.fill == "mean" else 0.0, banks[name])
    return {name: bank.astype(np.float32) for name, bank in banks.items()}, where


def _build(cell: Cell, widths: Sequence[int]) -> tuple[nnx.Dict, nnx.Module, optax.GradientTransformation]:
    rngs = nnx.Rngs(cell.seed)
    towers = nnx.Dict({name: Tower(width, cell, rngs=rngs) for name, width in zip(cell.modalities, widths)})
    rate = optax.warmup_cosine_decay_schedule(0.0, cell.learning_rate, cell.steps // 10, cell.steps)
    scalars = objectives.parameters(cell.objective, modalities=len(widths), dim=cell.embed_dim, rngs=rngs)
    return towers, scalars, adamw(rate, weight_decay=cell.weight_decay)


def _start(cell: Cell, widths: Sequence[int]) -> TrainState:
    return create_train_state(*_build(cell, widths), seed=cell.seed)[1]


@functools.lru_cache(maxsize=4)
def _compiled(cell: Cell, widths: Sequence[int]) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
    """The training step of a cell; cells that differ in their seed share it."""
    towers, scalars, optimizer = _build(cell, widths)
    graphdef, _ = create_train_state(towers, scalars, optimizer, seed=0)

    def loss(model: Any, scalars: Any, batch: Mapping[str, Any], rngs: nnx.Rngs):
        rows = batch["rows"]
        embeddings = {
            name: model[name](batch["banks"][name][rows, batch["copies"][name]], rngs) for name in cell.modalities
        }
        return objectives.loss(
            cell.objective, embeddings, scalars, anchor=cell.anchor, where=batch[WHERE], ids=rows, key=rngs.negatives()
        )

    return make_train_step(graphdef, optimizer, loss)


def _parameters(state: TrainState) -> dict[str, dict[str, np.ndarray]]:
    """Tower to the name of a parameter to its values."""
    towers: dict[str, dict[str, np.ndarray]] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state.params)["model"]):
        tower, *names = (part.key for part in path)
        towers.setdefault(tower, {})["/".join(names)] = np.asarray(value)
    return towers


def _save(trained: Trained, path: Path) -> None:
    arrays = {
        f"{number}/{tower}/{name}": value
        for number, towers in enumerate(trained.towers)
        for tower, parameters in towers.items()
        for name, value in parameters.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(partial, allow_pickle=False, record=np.array(describe(trained.cell)), **arrays)
    partial.replace(path)


def _load(cell: Cell, path: Path) -> Trained | None:
    """A kept cell; None, said on stderr, if its file is damaged."""
    towers: list[dict[str, dict[str, np.ndarray]]] = [{} for _ in range(cell.snapshots)]
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            for name in file.files:
                if name != "record":
                    number, tower, parameter = name.split("/", 2)
                    towers[int(number)].setdefault(tower, {})[parameter] = file[name]
    except (zipfile.BadZipFile, EOFError, ValueError, zlib.error) as error:
        print(f"{path} is damaged ({error}), and trained again", file=sys.stderr, flush=True)
        return None
    return Trained(cell, towers)

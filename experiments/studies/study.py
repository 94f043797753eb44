"""What the studies share: their options, tuning on validation, tables, and the folder they write."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tyro

from experiments.config import ConfigError
from experiments.studies import cells, features, measure, objectives
from experiments.studies.cells import Cell, Trained

QUICK_STEPS = 10
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Options:
    """Where a study's features come from, where its results go, and how much of it is run."""

    features: Path | None = None
    """An .npz of your own (see `experiments.studies.features`); default: the emoji set's."""
    anchor: str = "english"
    """The modality that anchored terms compare with the others."""
    modalities: tuple[str, ...] = ("english", "twitter", "speech")
    """What is aligned, where a study does not vary it."""
    data_dir: Path = Path("runs/data")
    """Where the prepared emoji set is, or will be."""
    output: Path = Path("runs/studies")
    """Every study writes into a folder of its own there; trained cells are kept in `cells`."""
    seeds: int | None = None
    """Runs of each setting. None: 5 where the table is the headline, 3 elsewhere."""
    quick: bool = False
    """Only see that it runs: few steps, one seed, one temperature of each objective, the ends of every sweep."""


class Study:
    """A study that runs: trains its cells, or finds them, and keeps its results."""

    def __init__(self, name: str, options: Options, *, seeds: int = 3):
        if options.seeds is not None and options.seeds < 1:
            raise ConfigError(f"seeds must be at least 1, got {options.seeds}")
        self.name = name
        self.options = options
        self.features = features.load(options.features, options.data_dir)
        if unknown := {*options.modalities, options.anchor} - set(self.features.modalities):
            raise ConfigError(f"modalities must be among {self.features.modalities}, got {sorted(unknown)}")
        if options.anchor not in options.modalities or len(set(options.modalities)) < len(options.modalities):
            raise ConfigError(f"modalities must be different and hold the anchor, got {options.modalities}")
        if len(options.modalities) < 2:
            raise ConfigError(f"modalities must be two or more, got {options.modalities}")
        self.seeds = range(1 if options.quick else options.seeds or seeds)
        self.folder = options.output / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output must be a folder that can be made, got {options.output}: {error}") from error
        self.validated: dict[str, list[tuple[float, Cell]]] = {}
        """Of what was tuned, every setting with its recall on validation, best first."""

    def cell(self, objective: cells.Objective, **settings: Any) -> Cell:
        """A cell on this study's modalities, unless `settings` says otherwise."""
        given = {"modalities": self.options.modalities, "anchor": self.options.anchor, **settings}
        if self.options.quick:
            given["steps"] = QUICK_STEPS
        return Cell(objective, **given)

    def sweep(self, values: Sequence[T]) -> Sequence[T]:
        """What is varied: all values, or the ends of them in a quick look."""
        return [values[0], values[-1]] if self.options.quick else values

    def train(self, wanted: Sequence[Cell]) -> list[Trained]:
        """Every cell, trained or found."""
        return cells.load_or_train(wanted, self.features, self.options.output / "cells")

    def over_seeds(self, cell: Cell) -> list[Trained]:
        """One cell, with every seed."""
        return self.train([dataclasses.replace(cell, seed=seed) for seed in self.seeds])

    def summaries(self, cell: Cell) -> list[dict[str, float]]:
        """`measure.summary` of a cell on the test split, for every seed, and the recall by `best_score`."""
        best = f"recall by {self.best_score(cell)}"
        found = [measure.summary(trained.embed(self.features.test), cell.anchor) for trained in self.over_seeds(cell)]
        return [{**one, "recall by best score": one[best]} for one in found]

    def validation(self, cell: Cell) -> dict[str, float]:
        """Recall of items on validation by every score, mean over all seeds."""
        found = [measure.joint(one.embed(self.features.validation), cell.anchor) for one in self.over_seeds(cell)]
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

    def best_score(self, cell: Cell) -> str:
        """The score with the best recall of items on validation, over all seeds."""
        found = self.validation(cell)
        return max(found, key=found.__getitem__)

    def tuned(self, name: str, candidates: Sequence[cells.Objective], **settings: Any) -> Cell:
        """The candidate with the best recall of items on validation, by whichever score is best, over two seeds.

        What was found is kept under `name`, and `write` says it.
        """
        if self.options.quick:
            candidates = candidates[len(candidates) // 2 :][:1]
        found = []
        for cell in [self.cell(candidate, **settings) for candidate in candidates]:
            of_two = self.train([dataclasses.replace(cell, seed=seed) for seed in self.seeds[:2]])
            joint = [measure.joint(one.embed(self.features.validation), cell.anchor) for one in of_two]
            found.append((float(np.mean([max(one.values()) for one in joint])), cell))
        self.validated[name] = sorted(found, key=lambda one: one[0], reverse=True)
        return self.validated[name][0][1]

    def write(self, results: Mapping[str, Any], tables: Mapping[str, str]) -> None:
        """`results.json`, and `results.md` with every table under its heading, which is also printed.

        Both end with the settings that were tuned, if any were.
        """
        tuned = {
            name: {"setting": objectives.describe(cell.objective), "validation": recall, "tried": 1 + len(others)}
            for name, [(recall, cell), *others] in self.validated.items()
        }
        if tuned:
            results = {**results, "tuned": tuned}
            lines = ["| objective | setting | recall on validation, % | settings tried |", "| :-- | :-- | --: | --: |"]
            for name, one in tuned.items():
                lines.append(f"| {name} | {one['setting']} | {100 * one['validation']:.1f} | {one['tried']} |")
            tables = {**tables, "Settings, chosen on validation over two seeds by the best score": "\n".join(lines)}
        text = "\n\n".join(f"## {heading}\n\n{table}" for heading, table in tables.items())
        record = {"features": self.features.fingerprint, "seeds": len(self.seeds), **results}
        (self.folder / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (self.folder / "results.md").write_text(f"# {self.name}\n\n{text}\n", encoding="utf-8")
        print(f"\n{text}\n\nWritten: {self.folder}")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds (0 of one), and the values."""
    array = np.asarray(values, float)
    return {
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if len(array) > 1 else 0.0,
        "values": [*values],
    }


def spreads(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """`spread` of every figure that all runs have."""
    return {name: spread([run[name] for run in runs]) for name in runs[0] if all(name in run for run in runs)}


def curve(row: Mapping[str, Mapping[str, Any]]) -> tuple[list[float], list[Mapping[str, Any]]]:
    """A row whose figures are named by the numbers that were varied, as places and spreads."""
    return [float(name) for name in row], [*row.values()]


def table(
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]],
    columns: Mapping[str, str],
    *,
    corner: str,
    scale: float = 100.0,
    digits: int = 1,
) -> str:
    """A markdown table of means ± standard deviations, if there are several values; the best of a column in bold.

    Args:
      rows: row's name to figure to `spread`.
      columns: heading to the name of the figure.
      corner: heading of the rows' names.
      scale: of the figures: 100 for per cent.
      digits: behind the point.
    """
    best = {
        figure: max(row[figure]["mean"] for row in rows.values() if figure in row)
        for figure in columns.values()
        if any(figure in row for row in rows.values())
    }
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "| :-- |" + " --: |" * len(columns)]
    for name, row in rows.items():
        entries = []
        for figure in columns.values():
            if figure not in row:
                entries.append("")
                continue
            mean, std = scale * row[figure]["mean"], scale * row[figure]["std"]
            bold = "**" if row[figure]["mean"] == best[figure] and len(rows) > 1 else ""
            spread_of = f" ± {std:.{digits}f}" if len(row[figure]["values"]) > 1 else ""
            entries.append(f"{bold}{mean:.{digits}f}{bold}{spread_of}")
        lines.append(f"| {name} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def main(run: Callable[[Options], None], description: str | None) -> None:
    """Run a study as the command line says."""
    options = tyro.cli(Options, description=description)
    try:
        run(options)
    except ConfigError as error:
        sys.exit(f"error: {error}")

"""What the default objective was chosen from: `python -m experiments.compare_objectives`.

Trains the default run with each of `CANDIDATES` and prints validation recalls at the last step, mean over the seeds.
Half an hour for each seed on two cores; interrupted, the same command goes on. The test split is not looked at.
"""

import dataclasses
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tyro

from experiments import train
from experiments.cli import interrupts_end_at_once, one_line_errors
from experiments.config import CONE_AND_PAIRS, ConfigError, Contrastive, Objective, TrainConfig
from experiments.validation import ITEM_SCORES


def _term(temperature: float) -> Contrastive:
    return Contrastive(weight=1.0, temperature=temperature)


CANDIDATES = (
    CONE_AND_PAIRS,
    Objective(cone=_term(0.08), pairwise_infonce=_term(0.05)),
    Objective(pairwise_infonce=_term(0.08)),
    Objective(gram=_term(0.08), pairwise_infonce=_term(0.08)),
    Objective(pairwise_infonce=_term(0.15)),
    Objective(cone=_term(0.2), pairwise_infonce=_term(0.15)),
    Objective(cone=_term(0.2)),
)


@dataclasses.dataclass(frozen=True)
class CompareObjectives:
    """Train the default run with several objectives and compare them on validation."""

    output: Path = Path("runs/objectives")
    """Holds a run for each objective and seed."""
    data_dir: Path = TrainConfig.data_dir
    """Where the prepared data set is, or will be."""
    seeds: tuple[int, ...] = (0,)


def name(objective: Objective) -> str:
    """Its terms and their temperatures, such as "cone 0.12 + pairwise_infonce 0.08"."""
    return " + ".join(f"{term} {options.temperature:g}" for term, options in vars(objective).items() if options.weight)


def configurations(args: CompareObjectives) -> dict[str, list[TrainConfig]]:
    """Name of every objective -> its runs, one for each seed."""
    return {
        name(objective): [
            TrainConfig(
                run_dir=args.output / f"{name(objective).replace(' + ', '+').replace(' ', '_')}-seed{seed}",
                data_dir=args.data_dir,
                objective=objective,
                seed=seed,
                evaluate=False,
            )
            for seed in args.seeds
        ]
        for objective in CANDIDATES
    }


def recalls(run_dir: Path) -> tuple[float, float]:
    """Recall in per cent at the last step: of pairs, and of items by the score that finds most."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = next(record for record in map(json.loads, reversed(lines)) if "validation/pairs" in record)
    return 100 * last["validation/pairs"], 100 * max(last[f"validation/{score}"] for score in ITEM_SCORES)


def table(found: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Markdown: for each objective its recalls, with their standard deviation if there are several."""
    lines = [["objective", "pairs", "items"], [":--", "--:", "--:"]]
    for objective, runs in found.items():
        spreads = [f" ± {spread:.1f}" for spread in np.std(runs, axis=0, ddof=1)] if len(runs) > 1 else ["", ""]
        means = np.mean(runs, axis=0)
        lines.append([objective, *(f"{mean:.1f}{spread}" for mean, spread in zip(means, spreads, strict=True))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(args: CompareObjectives) -> None:
    """Train what is not trained yet, and print the table."""
    runs = configurations(args)
    for config in (config for configs in runs.values() for config in configs):
        if (stopped := train.train(config)) is not None:
            sys.exit(128 + signal.Signals[stopped])
    print(f"Mean of validation recall at 1, 5 and 10 in per cent; seeds {', '.join(map(str, args.seeds))}\n")
    print(table({objective: [recalls(config.run_dir) for config in configs] for objective, configs in runs.items()}))


if __name__ == "__main__":
    with interrupts_end_at_once("interrupted: the same command goes on"), one_line_errors((ConfigError, OSError)):
        main(tyro.cli(CompareObjectives, description=__doc__))

"""The table of objectives: what is read of a run, means and spreads by hand, and how it stops."""

import json

import pytest

from experiments import compare_objectives, train
from experiments.config import CONE_AND_PAIRS
from experiments.validation import ITEM_SCORES


def write_metrics(run_dir, pairs, **items):
    """A run's lines: validated twice, the last step is not validated."""
    run_dir.mkdir(parents=True)
    scores = {f"validation/{name}": items.get(name, 0.01) for name in ITEM_SCORES}
    records = [
        {"step": 50, "validation/pairs": 0.9, **dict.fromkeys(scores, 0.9)},
        {"step": 100, "validation/pairs": pairs, **scores},
        {"step": 110, "loss": 1.0},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_recalls_are_of_the_last_validation_and_the_best_score(tmp_path):
    write_metrics(tmp_path / "run", 0.25, cone=0.5, volume=0.125)
    assert compare_objectives.recalls(tmp_path / "run") == (25.0, 50.0)


def test_table_has_means_and_standard_deviations():
    one, two = compare_objectives.table({"a": [(10.0, 20.0)]}), compare_objectives.table({"a": [(10, 20), (12, 26)]})
    assert one.splitlines()[2] == "| a | 10.0 | 20.0 |"
    assert two.splitlines()[2] == "| a | 11.0 ± 1.4 | 23.0 ± 4.2 |"


def test_every_objective_is_trained_with_every_seed(tmp_path, monkeypatch, capsys):
    trained = []

    def record(config):
        trained.append((config.objective, config.seed))
        write_metrics(config.run_dir, 0.1 * len(trained))

    monkeypatch.setattr(train, "train", record)
    compare_objectives.main(compare_objectives.CompareObjectives(output=tmp_path, seeds=(0, 7)))
    assert trained == [(objective, seed) for objective in compare_objectives.CANDIDATES for seed in (0, 7)]
    assert "| cone 0.12 + pairwise_infonce 0.08 | 15.0 ± 7.1 | 1.0 ± 0.0 |" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == len(trained)
    assert compare_objectives.CANDIDATES[0] == CONE_AND_PAIRS


def test_a_stopped_run_stops_the_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda config: "SIGTERM")
    with pytest.raises(SystemExit) as stopped:
        compare_objectives.main(compare_objectives.CompareObjectives(output=tmp_path))
    assert stopped.value.code == 143

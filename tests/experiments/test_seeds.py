"""The table over seeds: means and spreads by hand, and what is refused."""

import json

import pytest

from experiments import seeds


def write(folder, seed, recall, **config):
    row = {"query": "english", "answer": "twitter"}
    results = {
        "test_items": 10,
        "config": {"seed": seed, "run_dir": str(folder), "steps": 5} | config,
        "pairs": [
            row | {"answer": "speech", "recall@1": 0.9, "recall@10": 0.9},
            row | {"recall@1": recall, "recall@10": 2 * recall},
        ],
        "baseline": [row | {"recall@1": 0.1, "recall@10": 0.5}],
    }
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_means_and_standard_deviations(tmp_path):
    runs = [write(tmp_path / str(seed), seed, recall) for seed, recall in enumerate((0.1, 0.2, 0.3))]
    line = seeds.table(seeds.read(runs)).splitlines()[2]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "english → twitter", "20.0", "10.0", "+10.0 ± 10.0", "40.0", "50.0", "-10.0 ± 20.0",
    ]  # fmt: skip


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    runs = [write(tmp_path / "a", 0, 0.1), write(tmp_path / "b", 1, 0.1, steps=6), write(tmp_path / "c", 0, 0.1)]
    with pytest.raises(ValueError, match="two or more, got 1"):
        seeds.read(runs[:1])
    with pytest.raises(ValueError, match=r"b differs from .*a in \['steps'\]"):
        seeds.read(runs[:2])
    with pytest.raises(ValueError, match=r"different seeds, got \[0, 0\]"):
        seeds.read([runs[0], runs[2]])
    with pytest.raises(FileNotFoundError, match="must have been evaluated"):
        seeds.read([runs[0], tmp_path / "none"])

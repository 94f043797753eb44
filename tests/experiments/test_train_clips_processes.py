"""The training command on clips in several processes: the losses, and so the model, of one."""

import json

import pytest

from tests.experiments.training import TIMEOUT, lines
from tests.processes import free_address, started

pytestmark = pytest.mark.slow

STEPS = 4
SIZES = {
    "--steps": STEPS,
    "--batch-size": 4,
    "--validate-every": 2,
    "--log-every": 1,
    "--dtype": "float32",
    "--optimizer.learning-rate": 1e-3,
    "--clips.train-frames": 2,
    "--clips.eval-frames": 3,
    "--clips.caption-length": 8,
    "--clips.subtitle-length": 8,
    "--clips.image-size": 42,
    "--clips.slice-frames": 32,
    "--clips.mel-bins": 32,
}


def run(root, run_dir, processes, *options):
    shared = ["-m", "experiments.train", "--config", "gram_msrvtt", "--run-dir", str(run_dir)]
    shared += ["--initialize", str(root / "model"), "--vocabulary", str(root / "vocab.txt")]
    shared += ["--annotations", str(root / "train.json"), "--videos", str(root / "videos")]
    shared += ["--validation.annotations", str(root / "held_out.json"), "--no-remat", *options]
    shared += [str(part) for pair in SIZES.items() for part in pair]
    several = ["--distributed", "--coordinator", free_address(), "--num-processes", str(processes), "--process-id"]
    commands = [[*shared, *([*several, str(index)] if processes > 1 else [])] for index in range(processes)]
    with started(commands) as group:
        return group.finish(TIMEOUT)


@pytest.fixture(scope="module")
def together(training_clips, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("together")
    return run_dir, run(training_clips, run_dir, 2, "--shard-parameters")


def test_two_processes_give_the_losses_of_one(training_clips, together, tmp_path):
    """And what they have trained is written by one."""
    run_dir, printed = together
    assert "devices: 2, processes: 2" in printed[0]
    assert "give the same command in one process" in printed[0]
    assert not any(words in printed[1] for words in ("devices:", "validation recall", str(run_dir)))
    assert not (run_dir / "model").exists()
    run(training_clips, tmp_path, 1)
    ours, theirs = ([json.loads(line) for line in lines(folder)] for folder in (run_dir, tmp_path))
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
        assert a.get("validation/recall") == b.get("validation/recall")


def test_one_process_writes_what_two_have_trained(training_clips, together):
    run_dir, _ = together
    (printed,) = run(training_clips, run_dir, 1, "--shard-parameters")
    assert f"step {STEPS} of {STEPS}" in printed
    assert (run_dir / "model" / "config.json").exists()

"""The benchmark runs from end to end, and compares forms of the same thing."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from PIL import Image

from experiments import benchmark
from gramjax import linalg, losses
from tests import jaxprs, processes

TOY = {
    "dim": [8], "batch-sizes": [6], "large-batch-sizes": [6, 12], "modalities": [3], "memory-batch-sizes": [6],
    "sizes": [2], "dims": [4], "devices": [2], "device-batch": [6], "spectra": [6, 3, 8],
    "many-spectra": [6, 3, 8], "repeats": [1],
}  # fmt: skip


def _options(path, **others):
    words = [word for name, values in (TOY | others).items() for word in (f"--{name}", *map(str, values))]
    return tyro.cli(benchmark.Options, args=[*words, "--output", str(path)])


@pytest.mark.parametrize("of_their_own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_runs_from_end_to_end(of_their_own, tmp_path, monkeypatch, capsys):
    if not of_their_own:
        monkeypatch.setattr(benchmark, "_in_a_process", lambda function, *arguments, simulated=0: function(*arguments))
    path = tmp_path / "new" / "benchmark.json"
    benchmark.main(_options(path))
    assert sorted(x.name for x in path.parent.iterdir()) == ["benchmark.json", "benchmark.png"]

    rows = json.loads(path.read_text())["rows"]
    number = dict.fromkeys((row["study"] for row in rows), 0)
    for row in rows:
        number[row["study"]] += 1
        assert all(row[name] > 0 for name in ("seconds", "seconds_against", "bytes") if name in row)
        if "against" in row:
            np.testing.assert_allclose(row["ratio"], row["seconds_against"] / row["seconds"])
    assert number == {
        "other forms": 2 + 2 * (importlib.util.find_spec("torch") is not None),
        "floor": 2 + 1 + 1,
        "spectrum": 2,
        "many spectra": 1,
        "batch grows with the devices": 1,
        "batch divided over devices": 1,
        "memory": 1,
    }
    assert [row["batch"] for row in rows if "devices" in row] == [12, 12]
    printed = capsys.readouterr().out
    assert sum(line.startswith(tuple(f"| {study} |" for study in number)) for line in printed.splitlines()) == len(rows)
    with Image.open(path.with_suffix(".png")) as picture:
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"repeats": [0]}, "--repeats must be at least 1, got 0"),
        ({"modalities": [1, 3]}, r"--modalities must be at least 2, got \(1, 3\)"),
        ({"spectra": [6, 0, 8]}, r"--spectra must be at least 1, got \(\(6, 0, 8\),\)"),
    ],
)
def test_options_are_refused_before_anything_is_measured(option, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        benchmark.main(_options(tmp_path / "new" / "b.json", **option))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="--devices must list at least one number"):
        benchmark.check(benchmark.Options(devices=()))


def test_what_is_measured_outlives_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    path.write_text("before")

    def fail(options):
        raise MemoryError

    monkeypatch.setattr(benchmark, "_in_a_process", lambda function, *arguments, simulated=0: function(*arguments))
    monkeypatch.setattr(benchmark, "against_other_forms", fail)
    with pytest.raises(MemoryError):
        benchmark.main(_options(path))
    assert path.read_text() == "before"
    studies = {row["study"] for row in json.loads((tmp_path / "b.partial.json").read_text())["rows"]}
    assert {"memory", "many spectra"} <= studies


def test_memory_is_measured_up_to_what_fits(monkeypatch, capsys):
    def in_a_process(function, *arguments, simulated=0):
        if function is benchmark._platform:
            return {"platform": "gpu"}
        if arguments[0] > 40:
            raise MemoryError("exit status -9")
        return {"batch": arguments[0], "bytes": 1}

    monkeypatch.setattr(benchmark, "_in_a_process", in_a_process)
    options = benchmark.Options(memory_batch_sizes=(10, 20), accelerator_batch_sizes=(40, 80, 160))
    assert [row["batch"] for row in benchmark.memory(options)] == [10, 20, 40]
    assert capsys.readouterr().err == "memory: a batch of 80 does not fit (exit status -9)\n"


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", MemoryError, "exit status -9"),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory')", MemoryError, "exit status 1"),
        ("raise KeyError('else')", SystemExit, "KeyError: 'else'"),
    ],
)
def test_a_process_that_fails(code, error, message, monkeypatch):
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run([*command[:2], code], **options))
    with pytest.raises(error, match=message):
        benchmark._in_a_process(benchmark._platform)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/thread-self/children").exists(), reason="needs Linux's lists of child processes")
def test_what_measures_ends_when_the_benchmark_is_killed():
    """It may hold all of the memory."""
    code = "from experiments import benchmark; benchmark._in_a_process(benchmark._peak, 40000, 3, 512)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=processes.REPOSITORY) as killed:
        try:
            children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children")
            started = _until(lambda: children.read_text().split())
            _until(lambda: "end_with_standard_input" in Path(f"/proc/{started[0]}/cmdline").read_text())
        finally:
            killed.kill()
    try:
        _until(lambda: _has_ended(started[0]), seconds=20.0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(started[0]), signal.SIGKILL)


def _has_ended(process):
    status = Path(f"/proc/{process}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def _until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


@pytest.mark.parametrize("name", ["float32", "bfloat16"])  # CPUs have no TF32
def test_other_precisions_run(name):
    (row,) = benchmark._against_products(name, 6, 3, 8, 1)
    assert row["ratio"] > 0


@pytest.mark.parametrize("precision", benchmark.PRECISIONS.values(), ids=str)
def test_the_products_of_scores_have_the_precision_asked_for(precision):
    loss = jax.value_and_grad(lambda z: losses.gram_loss(z, precision=precision))
    equations = jaxprs.equations(jax.make_jaxpr(loss)(jnp.zeros((7, 3, 5))).jaxpr)
    # Of every query with every item; those within an item stay exact.
    found = [
        e.params["precision"]
        for e in equations
        if e.primitive.name == "dot_general" and e.outvars[0].aval.shape == (7, 7)
    ]
    expected = precision if isinstance(precision, jax.lax.DotAlgorithmPreset) else (precision, precision)
    assert found
    assert set(found) == {expected}


def test_the_forms_compute_the_same():
    z = benchmark.unit_vectors(6, 3, 8)
    expected = jax.jit(jax.value_and_grad(losses.gram_loss))(z)
    for form in (benchmark.published_gram_loss, benchmark.whole_matrix_gram_loss):
        for x, y in zip(jax.jit(jax.value_and_grad(form))(z), expected):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-3 * np.abs(y).max())
    (values, direction), (plain, left) = jax.jit(lambda z: (linalg.spectrum(z), benchmark.plain_spectrum(z)))(z)
    np.testing.assert_allclose(values, plain, rtol=1e-5)
    np.testing.assert_allclose(jnp.abs(jnp.sum(direction * left, axis=1)), np.ones(6), rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("shared", [False, True])
def test_pytorch_computes_the_same(shared):
    torch = pytest.importorskip("torch", reason="needs the packages that `make test-parity` installs")
    z = benchmark.unit_vectors(6, 3, 8)
    gradient = benchmark.published_gram_loss_in_torch(np.asarray(z), shared=shared)()
    assert isinstance(gradient, torch.Tensor)
    expected = jax.jit(jax.grad(losses.gram_loss))(z)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=0, atol=1e-3 * np.abs(expected).max())

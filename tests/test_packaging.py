"""What a user gets from the wheel alone."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LOSSES = """
import importlib.util, sys
from importlib.metadata import requires
import jax
import gramjax
from gramjax import losses, metrics

z = jax.random.normal(jax.random.key(0), (8, 3, 16))
z = z / jax.numpy.linalg.norm(z, axis=-1, keepdims=True)
for name in ("gram", "pmrl", "pairwise_infonce", "triangle", "symile"):
    loss = getattr(losses, f"{name}_loss")
    value, gradient = jax.jit(jax.value_and_grad(loss))(z)
    assert jax.numpy.isfinite(value) and jax.numpy.all(jax.numpy.isfinite(gradient))
assert 0 <= metrics.gram_alignment(z) <= 1
core = sorted(line.split(">=")[0] for line in requires("gramjax") if "extra ==" not in line)
assert [name.split("<")[0] for name in core] == ["einops", "jax", "jaxtyping"], core
absent = [name for name in ("flax", "optax", "orbax", "grain", "tensorflow_datasets") if importlib.util.find_spec(name)]
assert not absent, absent
print("works")
"""


def _run(*command, cwd):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_losses_import_nothing_but_the_core_dependencies():
    heavy = ("flax", "optax", "orbax", "grain", "tensorflow_datasets", "tokenizers", "PIL", "matplotlib")
    code = f"import sys, gramjax.losses; print([name for name in {heavy} if name in sys.modules])"
    assert _run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


WITHOUT_EXTRAS = """
import importlib, sys

sys.modules.update(dict.fromkeys(("flax", "optax", "orbax", "grain", "tensorflow_datasets", "tyro", "av")))
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(f"{error.name}: {error}")
"""


def test_what_is_missing_says_which_extra_brings_it():
    extras = {f"gramjax.{part}": "train" for part in ("encoders", "models", "checkpoints", "training", "data.emoji")}
    extras |= {"gramjax.data.pipeline": "train", "gramjax.data.media": "media", "experiments.train": "train"}
    printed = _run(sys.executable, "-c", WITHOUT_EXTRAS, *extras, cwd=ROOT).splitlines()
    for line, extra in zip(printed, extras.values(), strict=True):
        assert f"it comes with the {extra} extra of gramjax: pip install '.[{extra}]'" in line
        assert line.count("extra of gramjax") == 1


@pytest.mark.slow
def test_wheel_without_extras_gives_working_losses(tmp_path):
    _run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"gramjax", f"{wheel.name.split('-py3')[0]}.dist-info"}
    assert "gramjax/py.typed" in names
    assert any(name.startswith("gramjax/data/emoji/assets/") for name in names)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, cwd=tmp_path)
    assert _run(python, "-c", LOSSES, cwd=tmp_path).strip() == "works"

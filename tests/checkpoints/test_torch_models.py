"""Released files to models and back, and models in folders of their own."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gramjax.checkpoints import (
    export_torch,
    load_loss_parameters,
    load_model,
    load_torch,
    read_beats_config,
    read_gram_config,
    read_state_dict,
    read_torch_file,
    save_model,
    write_torch_file,
)
from gramjax.encoders import BERT, BEATs, BEATsConfig, BERTConfig, VisionConfig, VisionTransformer
from gramjax.encoders.conversion import from_torch, state_dict_of, strip_prefix
from gramjax.models import GramConfig, GramModel, LossParameters, gram_large, gram_tiny, vast_large
from tests.checkpoints.conftest import GOLDEN

VISION = VisionConfig(image_size=42, patch_size=14, width=48, depth=3, num_heads=3, mlp_dim=209)
AUDIO = BEATsConfig(patch_dim=24, width=32, depth=3, num_heads=4, mlp_dim=64, position_kernel=16, position_groups=4)
TEXT = BERTConfig(vocab_size=97, max_length=64, width=40, depth=3, num_heads=4, mlp_dim=80)


def parameters(model):
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def assert_same_parameters(model, other):
    ours, theirs = parameters(model), parameters(other)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def text_state_dict():
    with np.load(GOLDEN / "bert_tiny.npz") as file:
        tensors = strip_prefix(file, "sd/multimodal_encoder.bert.")
    return {name: value for name, value in tensors.items() if "crossattention" not in name}


def test_vision(golden_state_dict):
    model = load_torch(GOLDEN / "eva_tiny_fp16.pt", VISION)
    assert isinstance(model, VisionTransformer)
    half = {key: value.astype(np.float16) for key, value in golden_state_dict("eva_tiny").items()}
    assert_same_parameters(model, from_torch(VisionTransformer, VISION, strip_prefix(half, "visual.")))


def test_audio_and_its_configuration(golden_state_dict):
    assert read_beats_config(GOLDEN / "beats_tiny.pt") == AUDIO
    model = load_torch(GOLDEN / "beats_tiny.pt", AUDIO)
    assert_same_parameters(model, from_torch(BEATs, AUDIO, golden_state_dict("beats_tiny")))
    with pytest.raises(ValueError, match="has no configuration of BEATs"):
        read_beats_config(GOLDEN / "eva_tiny_fp16.pt")


def test_what_a_released_file_says_of_itself(tmp_path):
    assert read_gram_config(GOLDEN / "gram_tiny_ddp.pt") == gram_large(vision_frames=4, audio_slices=2)
    shapes = {"vision_frame_embedding": (1, 8, 6), "audio_frame_embedding": (1, 1, 6)}
    write_torch_file(tmp_path / "vast.pt", {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    assert read_gram_config(tmp_path / "vast.pt") == vast_large(vision_frames=8)
    with pytest.raises(ValueError, match=r"no GRAM, PMRL or VAST checkpoint: vision_frame_embedding must have 3 axes"):
        read_gram_config(GOLDEN / "eva_tiny_fp16.pt")


@pytest.mark.parametrize("prefix", ["", "bert.", "module.multimodal_encoder.bert."])
def test_text_from_a_folder(tmp_path, text_state_dict, prefix):
    tensors = {prefix + name: value for name, value in text_state_dict.items()}
    if prefix:  # parts of the file that are not BERT's
        tensors[prefix.removesuffix("bert.") + "cls.predictions.bias"] = np.zeros(97, np.float32)
    write_torch_file(tmp_path / "pytorch_model.bin", tensors)
    assert_same_parameters(load_torch(tmp_path, TEXT), from_torch(BERT, TEXT, text_state_dict))


def test_towers_out_of_a_whole_model(golden_state_dict):
    everything = golden_state_dict("gram_tiny")
    for config, kind, prefix in (
        (VISION, VisionTransformer, "vision_encoder.visual."),
        (AUDIO, BEATs, "audio_encoder."),
    ):
        model = load_torch(GOLDEN / "gram_tiny_ddp.pt", config)
        assert_same_parameters(model, from_torch(kind, config, strip_prefix(everything, prefix)))


def test_dtypes():
    model = load_torch(GOLDEN / "eva_tiny_fp16.pt", VISION, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {value.dtype for value in parameters(model).values()} == {jnp.dtype(jnp.bfloat16)}
    assert model.dtype == jnp.bfloat16


def test_all_problems_are_listed_by_name(tmp_path, golden_state_dict):
    tensors = golden_state_dict("beats_tiny")
    del tensors["layer_norm.weight"]
    tensors["layer_norm.bias"] = tensors["layer_norm.bias"][:-1]
    tensors["stranger"] = np.zeros(2, np.float32)
    write_torch_file(tmp_path / "f.pt", {"model": tensors})
    with pytest.raises(ValueError, match="does not fit BEATs") as error:
        load_torch(tmp_path / "f.pt", AUDIO)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert len(lines) == 3
    for start in ("missing: layer_norm.weight", "wrong shape: layer_norm.bias (23,)", "unexpected: stranger"):
        assert any(line.startswith(start) for line in lines), lines


def test_patches_of_another_size_are_refused_by_name():
    """Positions may be interpolated, patches may not: the kernel is named, with its shape and the one needed."""
    smaller = replace(VISION, image_size=28, patch_size=7)
    needed = r"patch_embed\.proj\.weight \(48, 3, 14, 14\) cannot become .*kernel \(7, 7, 3, 48\)"
    whole = replace(gram_tiny(), towers={**gram_tiny().towers, "vision": smaller})
    for file, config, prefix in (
        ("eva_tiny_fp16.pt", smaller, ""),
        ("gram_tiny_ddp.pt", whole, r"vision_encoder\.visual\."),
    ):
        with pytest.raises(ValueError, match=rf"\n  wrong shape: {prefix}{needed}") as caught:
            load_torch(GOLDEN / file, config, other_image_size=True)
        assert str(caught.value).count("\n") == 1


def test_shapes_are_checked_before_values_are_read(tmp_path, monkeypatch, golden_state_dict):
    tensors = golden_state_dict("eva_tiny")
    write_torch_file(tmp_path / "f.pt", tensors)
    read = []
    from gramjax.checkpoints import stored

    original = stored.Storage.read
    monkeypatch.setattr(stored.Storage, "read", lambda self, *args: read.append(1) or original(self, *args))
    with pytest.raises(ValueError, match="wrong shape"):
        load_torch(tmp_path / "f.pt", replace(VISION, mlp_dim=208))
    assert not read
    load_torch(tmp_path / "f.pt", VISION)
    assert len(read) == len(tensors) - 3  # all but the logit scale and CLIP's projection


@pytest.mark.usefixtures("unchecked_signatures")
def test_other_configurations_are_type_errors(tmp_path):
    with pytest.raises(TypeError, match="config must be one of"):
        load_torch(GOLDEN / "beats_tiny.pt", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be one of \['VisionTransformer', .*got Linear"):
        export_torch(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tmp_path / "f.pt")


@pytest.mark.parametrize(
    ("source", "config", "left_out"),
    [
        ("eva_tiny_fp16.pt", VISION, {"logit_scale", "visual.head.weight", "visual.head.bias"}),
        ("beats_tiny.pt", AUDIO, set()),
    ],
)
def test_export_is_the_release_again(tmp_path, source, config, left_out):
    model = load_torch(GOLDEN / source, config)
    export_torch(model, tmp_path / "f.pt")
    released, exported = read_state_dict(GOLDEN / source), read_state_dict(tmp_path / "f.pt")
    assert set(released) - set(exported) == left_out
    for name, tensor in exported.items():
        np.testing.assert_array_equal(tensor, np.asarray(released[name]).astype(np.float32), err_msg=name)
    assert_same_parameters(load_torch(tmp_path / "f.pt", config), model)


def test_exported_audio_has_its_configuration(tmp_path):
    export_torch(load_torch(GOLDEN / "beats_tiny.pt", AUDIO), tmp_path / "f.pt")
    assert read_beats_config(tmp_path / "f.pt") == AUDIO
    assert set(read_torch_file(tmp_path / "f.pt")) == {"cfg", "model"}


def test_export_of_text(tmp_path, text_state_dict):
    model = from_torch(BERT, TEXT, text_state_dict, param_dtype=jnp.bfloat16)
    export_torch(model, tmp_path / "f.pt")
    exported = read_state_dict(tmp_path / "f.pt")
    assert set(text_state_dict) - set(exported) == {"embeddings.position_ids"}
    assert {str(tensor.dtype) for tensor in exported.values()} == {"bfloat16"}
    assert_same_parameters(load_torch(tmp_path / "f.pt", TEXT, param_dtype=jnp.bfloat16), model)


def test_export_takes_existing_files_only_when_asked(tmp_path):
    model = load_torch(GOLDEN / "beats_tiny.pt", AUDIO)
    export_torch(model, tmp_path / "f.pt")
    with pytest.raises(ValueError, match="path must not exist unless overwrite=True"):
        export_torch(model, tmp_path / "f.pt")
    export_torch(model, tmp_path / "f.pt", overwrite=True)
    assert os.listdir(tmp_path) == ["f.pt"]


@pytest.mark.parity
def test_pytorch_loads_an_export(tmp_path, golden_state_dict):
    torch = pytest.importorskip("torch", reason="needs the packages that `make test-parity` installs")
    export_torch(load_torch(GOLDEN / "beats_tiny.pt", AUDIO), tmp_path / "f.pt")
    loaded, released = (torch.load(path, weights_only=True) for path in (tmp_path / "f.pt", GOLDEN / "beats_tiny.pt"))
    assert set(loaded["model"]) == set(released["model"])
    for name, tensor in released["model"].items():
        assert torch.equal(loaded["model"][name], tensor), name
    assert {name: loaded["cfg"][name] for name in released["cfg"] if name != "finetuned_model"} == {
        name: value for name, value in released["cfg"].items() if name != "finetuned_model"
    }


@pytest.mark.parity
def test_pytorch_loads_a_whole_exported_model(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the packages that `make test-parity` installs")
    released = torch.load(GOLDEN / "gram_tiny_ddp.pt", weights_only=True)
    released = {name.removeprefix("module."): tensor for name, tensor in released.items()}
    temperature = LossParameters.from_torch({"contra_temp": released["contra_temp"].numpy()})
    export_torch(load_torch(GOLDEN / "gram_tiny_ddp.pt", gram_tiny()), tmp_path / "f.pt", loss_parameters=temperature)
    loaded = torch.load(tmp_path / "f.pt", weights_only=True)
    left_out = set(released) - set(loaded)
    unused = ("vision_encoder.text.", "vision_encoder.logit_scale", "vision_encoder.visual.head.")
    assert all(name.startswith(unused) or name.endswith("position_ids") for name in left_out)
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, released[name], rtol=1e-6 if name == "contra_temp" else 0, atol=0, msg=name)


def filled(constructor):
    """A module with numbers in it, and nothing compiled."""
    model = nnx.eval_shape(constructor)
    draw = np.random.default_rng(0).normal
    nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape), leaf.dtype), nnx.state(model)))
    return model


def test_models_in_folders(tmp_path):
    config = GramConfig({"text": TEXT, "audio": AUDIO}, {"caption": "text", "sound": "audio"}, embed_dim=8)
    model = filled(lambda: GramModel(config, rngs=nnx.Rngs(0)))
    save_model(tmp_path / "model", model)
    again = load_model(tmp_path / "model")
    assert again.config == config
    assert_same_parameters(again, model)
    with pytest.raises(ValueError, match="path must not exist unless overwrite=True"):
        save_model(tmp_path / "model", again)
    audio = load_torch(GOLDEN / "beats_tiny.pt", AUDIO)
    save_model(tmp_path / "model", audio, overwrite=True)
    assert_same_parameters(load_model(tmp_path / "model"), audio)
    assert os.listdir(tmp_path) == ["model"]
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none")
    with pytest.raises(ValueError, match="path must be one to be replaced"):
        save_model(tmp_path, audio, overwrite=True)
    assert os.listdir(tmp_path) == ["model"]


def test_a_damaged_folder_is_named(tmp_path):
    model = filled(lambda: BERT(TEXT, rngs=nnx.Rngs(0)))
    path = tmp_path / "model"
    save_model(path, model)
    config, parameters = path / "config.json", path / "parameters"
    whole = config.read_bytes()
    for contents in (whole[:40], b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"type": "BERTConfig", "depths": 1}'):
        config.write_bytes(contents)
        with pytest.raises(ValueError, match=rf"^{config} does not describe a model: .+$"):
            load_model(path)
    values = json.loads(whole)
    config.write_text(json.dumps(values | {"depth": values["depth"] + 1}))
    with pytest.raises(ValueError, match=rf"^{parameters} must fit config\.json beside it: .+$"):
        load_model(path)
    config.write_bytes(whole)
    (parameters / "checksums.json").unlink()
    (parameters / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match=rf"^{parameters} must fit config\.json beside it: .+$"):
        load_model(path)
    shutil.rmtree(parameters)
    parameters.mkdir()
    with pytest.raises(ValueError, match=rf"^{parameters} must fit .*: path must be .* whole.*_METADATA is missing$"):
        load_model(path)


@pytest.mark.parametrize("arguments", [{"temperature": 0.05}, {"learn_temperature": False, "bias": -10.0}])
def test_the_scalars_of_the_loss_are_kept_with_a_model(tmp_path, arguments):
    audio = load_torch(GOLDEN / "beats_tiny.pt", AUDIO)
    save_model(tmp_path / "model", audio, loss_parameters=LossParameters(**arguments))
    kept = load_loss_parameters(tmp_path / "model").to_json()
    expected = {"temperature": 0.07, "learn_temperature": True, "bias": None} | arguments
    assert {**kept, "temperature": pytest.approx(kept["temperature"], rel=1e-6)} == expected
    (tmp_path / "model" / "loss.json").write_text('{"temperatur": 1}')
    with pytest.raises(ValueError, match=r"loss\.json does not describe the scalars of a loss: .*temperatur"):
        load_loss_parameters(tmp_path / "model")
    save_model(tmp_path / "model", audio, overwrite=True)
    assert load_loss_parameters(tmp_path / "model") is None
    with pytest.raises(FileNotFoundError):
        load_loss_parameters(tmp_path)


def test_the_temperature_goes_back_with_a_whole_model(tmp_path):
    model = load_torch(GOLDEN / "gram_tiny_ddp.pt", gram_tiny())
    released = read_state_dict(GOLDEN / "gram_tiny_ddp.pt")
    export_torch(model, tmp_path / "f.pt", loss_parameters=LossParameters.from_torch(released))
    exported = read_state_dict(tmp_path / "f.pt")["contra_temp"]
    assert exported.shape == ()
    np.testing.assert_allclose(exported, released["contra_temp"], rtol=1e-6)
    assert_same_parameters(load_torch(tmp_path / "f.pt", gram_tiny()), model)
    with pytest.raises(ValueError, match="loss_parameters must be None but for a GramModel, got them with BEATs"):
        export_torch(load_torch(GOLDEN / "beats_tiny.pt", AUDIO), tmp_path / "g.pt", loss_parameters=LossParameters())
    assert os.listdir(tmp_path) == ["f.pt"]


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    audio = load_torch(GOLDEN / "beats_tiny.pt", AUDIO)
    save_model(tmp_path / "model", audio)

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("gramjax.checkpoints.models.save", fail)
    with pytest.raises(OSError, match="no space"):
        save_model(tmp_path / "model", load_torch(GOLDEN / "eva_tiny_fp16.pt", VISION), overwrite=True)
    assert os.listdir(tmp_path) == ["model"]
    assert_same_parameters(load_model(tmp_path / "model"), audio)


def zeros(config):
    """The state dict of a vision tower, in no memory."""
    model = nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0)))
    without_memory = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), nnx.state(model))
    nnx.update(model, without_memory)
    return state_dict_of(model, VisionTransformer.torch_rules(config))


MEMORY = """
import resource, sys
import jax.numpy as jnp
from gramjax.checkpoints import load_torch
from gramjax.encoders import VisionConfig

config = VisionConfig(image_size=28, width=1024, depth=int(sys.argv[2]), num_heads=16, mlp_dim=4096)
model = load_torch(sys.argv[1], config)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_loading_needs_memory_for_the_model_and_little_more(tmp_path):
    """Peak memory of processes that load 4 and 20 blocks of 50 MB: the difference is that of the models."""
    peaks = {}
    for depth in (4, 20):
        config = VisionConfig(image_size=28, width=1024, depth=depth, num_heads=16, mlp_dim=4096)
        write_torch_file(tmp_path / "f.pt", zeros(config), overwrite=True)
        environment = {**os.environ, "XLA_FLAGS": "", "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "f.pt"), str(depth)]
        peaks[depth] = int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout) * 1024
    blocks = 16 * (4 * 1024 * 1024 + 2 * 1024 * 4096) * 4
    assert peaks[20] - peaks[4] < 1.1 * blocks


def test_reading_needs_memory_for_one_tensor(tmp_path):
    write_torch_file(tmp_path / "f.pt", {f"w{i}": np.full((1024, 256), i, np.float32) for i in range(16)})
    tracemalloc.start()
    tensors = read_state_dict(tmp_path / "f.pt")
    sums = [float(np.asarray(tensor).sum()) for tensor in tensors.values()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sums == [1024 * 256 * i for i in range(16)]
    assert peak < 1.5 * 1024 * 256 * 4

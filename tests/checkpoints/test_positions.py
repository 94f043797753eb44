"""Position embeddings of pictures of another size than those in a file."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flax import nnx

from gramjax.checkpoints import load_torch, write_torch_file
from gramjax.checkpoints.positions import resize_positions
from gramjax.encoders import BERTConfig, VisionConfig
from gramjax.models import gram_tiny
from tests.checkpoints.conftest import GOLDEN

VISION = VisionConfig(image_size=42, patch_size=14, width=48, depth=3, num_heads=3, mlp_dim=209)
WHOLE = gram_tiny()
TABLE = np.array([7, 3, -1, 4, 1, -5, 9, 2, 6, -5], np.float32).reshape(1, 10, 1)
# By torch.nn.functional.interpolate(align_corners=False), which the published codes call.
# fmt: off
BICUBIC = {
    56: [3.42036, 0.19844, 0.4324, 3.95363, 2.06863, -3.95232, -0.60181, 9.70557,
         1.32841, -1.18981, 0.39188, 4.93362, 1.73315, 6.49513, 2.69737, -6.92323],
    28: [1.14479, 3.66217, 2.25661, -0.4566],
}
BILINEAR = {
    56: [3, 0.5, 0.875, 4, 1.75, -1.53125, 0.48438, 7.125, 1.375, -0.03125, 0.85938, 3.75, 2, 4.5, 1.875, -5],
    28: [1.375, 3.4375, 2.125, -0.3125],
}
# fmt: on


def whole(image_size):
    return replace(WHOLE, towers={**WHOLE.towers, "vision": replace(VISION, image_size=image_size)})


def parameters(model):
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.mark.parametrize("size", [56, 28])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_patches_are_interpolated_and_the_class_token_stays(size, dtype):
    for config, key, expected in (
        (replace(VISION, image_size=size), "pos_embed", BICUBIC),
        (whole(size), "vision_encoder.visual.pos_embed", BILINEAR),
    ):
        tensors: Any = {key: TABLE.astype(dtype), "other": TABLE}
        resized = resize_positions(tensors, config)
        assert resized["other"] is TABLE
        assert resized[key].shape == (1, 1 + (size // 14) ** 2, 1)
        np.testing.assert_allclose(np.asarray(resized[key])[0, :, 0], [7, *expected[size]], atol=1e-5)


def test_the_rest_of_the_file_is_as_it_was():
    larger = replace(VISION, image_size=56)
    with pytest.raises(ValueError, match=r"wrong shape: pos_embed \(1, 10, 48\)"):
        load_torch(GOLDEN / "eva_tiny_fp16.pt", larger)
    model = load_torch(GOLDEN / "eva_tiny_fp16.pt", larger, other_image_size=True)
    before, after = (parameters(one) for one in (load_torch(GOLDEN / "eva_tiny_fp16.pt", VISION), model))
    assert model.config == larger
    assert after["position_embedding"].shape == (17, 48)
    np.testing.assert_array_equal(after["position_embedding"][0], before["position_embedding"][0])
    assert before.keys() == after.keys()
    for name in before.keys() - {"position_embedding"}:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


def test_a_whole_model_for_smaller_pictures():
    model = load_torch(GOLDEN / "gram_tiny_ddp.pt", whole(28), other_image_size=True)
    assert model.towers["vision"].position_embedding.shape == (5, 48)


@pytest.mark.parametrize("shape", [(1, 12, 48), (1, 1, 48), (2, 17, 48), (1, 17, 47), (17, 48)])
def test_what_is_no_square_of_patches_is_refused_by_name(tmp_path, golden_state_dict, shape):
    tensors = golden_state_dict("eva_tiny") | {"visual.pos_embed": np.zeros(shape, np.float32)}
    write_torch_file(tmp_path / "f.pt", tensors)
    with pytest.raises(ValueError, match=r"does not fit VisionTransformer:\n  wrong shape: pos_embed") as caught:
        load_torch(tmp_path / "f.pt", VISION, other_image_size=True)
    assert str(caught.value).count("\n") == 1


def test_there_may_be_nothing_to_resize():
    cases: Any = (
        ({"pos_embed": TABLE}, VISION),
        ({"pos_embed": TABLE}, BERTConfig()),
        ({}, VISION),
        ({"pos_embed": np.zeros((1, 17, 48), np.int32)}, VISION),
    )
    for tensors, config in cases:
        assert resize_positions(tensors, config) is tensors


@pytest.mark.parity
@pytest.mark.parametrize(("mode", "config"), [("bicubic", replace(VISION, image_size=98)), ("bilinear", whole(98))])
def test_pytorch_interpolates_so(mode, config):
    torch = pytest.importorskip("torch", reason="needs the packages that `make test-parity` installs")
    table = np.random.default_rng(0).normal(size=(1, 26, 3)).astype(np.float32)
    grid = torch.from_numpy(table[:, 1:]).reshape(1, 5, 5, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(7, 7), mode=mode, align_corners=False)
    key = "pos_embed" if mode == "bicubic" else "vision_encoder.visual.pos_embed"
    tensors: Any = {key: table}
    resized = np.asarray(resize_positions(tensors, config)[key])
    np.testing.assert_allclose(resized[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 49, 3), atol=1e-5)

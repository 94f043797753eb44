"""Models from released PyTorch checkpoints, and back."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from gramjax.checkpoints.positions import resize_positions
from gramjax.checkpoints.state_dicts import read_file, read_state_dict
from gramjax.checkpoints.torch_writer import write_torch_file
from gramjax.encoders import BERT, BEATs, BEATsConfig, BERTConfig, VisionConfig, VisionTransformer
from gramjax.encoders.conversion import Rule, Tensor, from_torch, state_dict_of, strip_prefix
from gramjax.models import GramConfig, GramModel, LossParameters, gram_large, vast_large

ModelConfig = VisionConfig | BEATsConfig | BERTConfig | GramConfig

# Where a model's names are in the files that hold it: in one of its own, in a file with other parts, in a whole GRAM.
_PREFIXES: dict[type, tuple[str, ...]] = {
    VisionTransformer: ("visual.", "vision_encoder.visual.", ""),
    BEATs: ("", "audio_encoder."),
    BERT: ("", "bert.", "multimodal_encoder.bert."),
    GramModel: ("",),
}


def load_torch(
    source: str | os.PathLike,
    config: ModelConfig,
    *,
    other_image_size: bool = False,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> Any:
    """Builds a model from a PyTorch checkpoint.

    Nothing in the file is executed (see `read_torch_file`). Names, shapes and dtypes are checked first, then the
    tensors are read one by one: memory is needed for the model and one tensor.

    Args:
        source: file or folder: a GRAM, PMRL or VAST checkpoint (`.pt`, or `pytorch_model.bin`, also in several files),
            EVA-CLIP's or BEATs' file, a folder with BERT; PyTorch's format or safetensors; with any of the wrappers,
            prefixes and old names that `read_state_dict` knows. An encoder may be taken out of a larger model's file.
        config: of the model: `VisionConfig` gives a `VisionTransformer`, `BEATsConfig` a `BEATs` (`read_beats_config`
            finds it in the file), `BERTConfig` a `BERT`, `GramConfig` a `GramModel`.
        other_image_size: take a file of a vision tower for pictures of another size than `config.image_size` too. The
            position embeddings of its patches are then interpolated, as the published codes do: bicubically for a
            `VisionTransformer`, bilinearly for a `GramModel`; the class token's stays. False: it is refused.
        dtype: of the computation.
        param_dtype: of the parameters, whatever the file's.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: the file cannot be read or is refused, or does not fit the configuration: all keys that are missing,
            unexpected, or of a wrong shape or dtype are listed by name.
        TypeError: `config` is none of the above.
    """
    kind = model_class(config)
    state_dict = _part(read_state_dict(source), kind.torch_rules(config), _PREFIXES[kind])
    if other_image_size:
        state_dict = resize_positions(state_dict, config)
    return from_torch(kind, config, state_dict, dtype=dtype, param_dtype=param_dtype)


def export_torch(
    model: nnx.Module,
    path: str | os.PathLike,
    *,
    loss_parameters: LossParameters | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model as the PyTorch code that it was published with loads it.

    That is a file of `torch.save`, which `torch.load(path, weights_only=True)` reads: a state dict under the published
    names; for `BEATs` {"cfg": ..., "model": ...}, for `VisionTransformer` with the prefix "visual.". Tensors of the
    published model that this one has no use for (CLIP's text tower and projections, position ids, BERT's pooler) are
    not written: load with `strict=False`.

    Args:
        model: a `VisionTransformer`, `BEATs`, `BERT` or `GramModel`.
        path: the file to make; it appears only once everything is in it.
        loss_parameters: whose temperature is written as `contra_temp`, with a `GramModel`; None: the file has none.
        overwrite: replace what is there.

    Raises:
        ValueError: `path` exists and `overwrite` is False, the model is one that was never published (an encoder with
            a convolutional stem), or `loss_parameters` are given with an encoder.
        TypeError: `model` is none of the above.

    >>> import tempfile
    >>> config = BERTConfig(vocab_size=9, max_length=4, width=8, depth=1, num_heads=2, mlp_dim=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_torch(BERT(config, rngs=nnx.Rngs(0)), f"{folder}/text.pt")
    ...     load_torch(f"{folder}/text.pt", config).config == config
    True
    """
    if type(model) not in _PREFIXES:
        raise TypeError(f"model must be one of {[kind.__name__ for kind in _PREFIXES]}, got {type(model).__name__}")
    config = model.config  # type: ignore[attr-defined]
    tensors = state_dict_of(model, type(model).torch_rules(config))  # type: ignore[attr-defined]
    prefix = _PREFIXES[type(model)][0]
    contents: dict[str, Any] = {prefix + name: tensor for name, tensor in tensors.items()}
    if loss_parameters is not None:
        if not isinstance(model, GramModel):
            raise ValueError(f"loss_parameters must be None but for a GramModel, got them with {type(model).__name__}")
        contents |= loss_parameters.to_torch()
    if isinstance(config, BEATsConfig):
        contents = {"cfg": config.to_torch(), "model": contents}
    write_torch_file(path, contents, overwrite=overwrite)


def read_beats_config(source: str | os.PathLike) -> BEATsConfig:
    """The configuration that a BEATs file holds beside its parameters.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read or is refused, has no configuration, or one of an encoder not known here.
    """
    contents = read_file(Path(source))
    if not isinstance(contents, dict) or not isinstance(contents.get("cfg"), dict):
        raise ValueError(f"{source} has no configuration of BEATs (a dictionary 'cfg' beside 'model')")
    return BEATsConfig.from_torch(contents["cfg"])


def read_gram_config(source: str | os.PathLike) -> GramConfig:
    """The configuration of a released GRAM, PMRL or VAST checkpoint, which differ in frames, slices and depth.

    Towers and heads are those of `gram_large`; a file of other sizes does not fit it, as `load_torch` then says.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: the file cannot be read or is refused, or lacks the learned embeddings of frames and slices.
    """
    state_dict = read_state_dict(source)
    counts = {}
    for name in ("vision", "audio"):
        key = f"{name}_frame_embedding"
        shape = state_dict[key].shape if key in state_dict else ()
        if len(shape) != 3:
            raise ValueError(f"{source} is no GRAM, PMRL or VAST checkpoint: {key} must have 3 axes, got {shape}")
        counts[name] = shape[1]
    named = gram_large if "contra_head_d.linear.weight" in state_dict else vast_large
    return named(vision_frames=counts["vision"], audio_slices=counts["audio"])


def model_class(config: ModelConfig) -> Any:
    """The class of models that a configuration is for.

    Raises:
        TypeError: there is none.
    """
    match config:
        case VisionConfig():
            return VisionTransformer
        case BEATsConfig():
            return BEATs
        case BERTConfig():
            return BERT
        case GramConfig():
            return GramModel
    raise TypeError(f"config must be one of {ModelConfig}, got {type(config).__name__}")


def _part(state_dict: Mapping[str, Tensor], rules: Sequence[Rule], prefixes: Sequence[str]) -> Mapping[str, Tensor]:
    """The part of a state dict that a table is for: under the prefix with the most of the table's names."""
    names = {name for r in rules for name in r.names}
    best = max(prefixes, key=lambda prefix: sum(prefix + name in state_dict for name in names))
    return strip_prefix(state_dict, best)

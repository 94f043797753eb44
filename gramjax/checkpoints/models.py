"""One model in one folder: its configuration as JSON, its parameters, the scalars of the loss it was trained with."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gramjax.checkpoints.folders import check_destination, whole_folder
from gramjax.checkpoints.torch_models import ModelConfig, model_class
from gramjax.checkpoints.trees import restore, save
from gramjax.models import LossParameters, from_json, to_json

_CONFIG = "config.json"
_PARAMETERS = "parameters"
_LOSS = "loss.json"
MARKS = (_CONFIG, _PARAMETERS)
"""By these the folder of a model is told from others."""


def save_model(
    path: str | os.PathLike,
    model: nnx.Module,
    *,
    loss_parameters: LossParameters | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model to a folder, which appears only once everything is in it.

    Args:
        path: the folder to make: `config.json`, `parameters` as Orbax writes them, and perhaps `loss.json`.
        model: a `GramModel`, `VisionTransformer`, `BEATs` or `BERT`.
        loss_parameters: what it was trained with, for `load_loss_parameters`; None: nothing is kept of that.
        overwrite: replace the folder of a model, with all that is in it, or an empty folder.

    Raises:
        ValueError: `path` exists and `overwrite` is False, it is another folder or a file, or no folder can be made
            there.
    """
    path = Path(path)
    check_destination(path, MARKS, overwrite=overwrite)
    with whole_folder(path) as folder:
        config = to_json(model.config)  # type: ignore[attr-defined]
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save(folder / _PARAMETERS, nnx.state(model, nnx.Param))
        if loss_parameters is not None:
            (folder / _LOSS).write_text(json.dumps(loss_parameters.to_json()) + "\n", encoding="utf-8")


def load_model(
    path: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    shardings: Callable[[Any], Any] | None = None,
) -> Any:
    """Reads a model that `save_model` wrote.

    Args:
        path: the folder.
        dtype: of the computation.
        param_dtype: of the parameters, whatever they were saved in.
        shardings: from the tree of the parameters' shapes to that of their places, such as
            `lambda tree: gramjax.training.parameter_shardings(tree, mesh)`: every device then reads its parts alone.
            None: everything goes to the default device.

    Raises:
        FileNotFoundError: nothing was saved at `path`.
        ValueError: what is there is not such a model.
    """
    path = Path(path)
    config = read_config(path / _CONFIG)
    kind = model_class(config)
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype))
    target = nnx.state(model, nnx.Param)
    if shardings is not None:
        target = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), target, shardings(target)
        )
    try:
        parameters = restore(path / _PARAMETERS, target)
    except ValueError as error:
        raise ValueError(f"{path / _PARAMETERS} must fit {_CONFIG} beside it: {str(error).splitlines()[0]}") from error
    nnx.update(model, parameters)
    return model


def load_loss_parameters(path: str | os.PathLike) -> LossParameters | None:
    """Reads the scalars of the loss that `save_model` kept with a model, or None if it was given none.

    Raises:
        FileNotFoundError: no model was saved at `path`.
        ValueError: what is there is damaged.
    """
    path = Path(path)
    read_config(path / _CONFIG)
    if not (path / _LOSS).exists():
        return None
    try:
        return LossParameters(**json.loads((path / _LOSS).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path / _LOSS} does not describe the scalars of a loss: {error}") from error


def read_config(path: str | os.PathLike) -> ModelConfig:
    """Reads the configuration of a model from a JSON file, as `save_model` writes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not describe a model.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return from_json(_Model, {"type": _Model.__name__, "config": values}).config
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a model: {error}") from error


@dataclass(frozen=True)
class _Model:
    config: ModelConfig

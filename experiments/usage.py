"""How a model is meant to read clips: kept in its folder, so that what uses the model need not be told."""

import json
from dataclasses import dataclass
from pathlib import Path

from experiments.encoding import MATCHED
from gramjax.checkpoints import save_model
from gramjax.checkpoints.folders import check_destination, whole_folder
from gramjax.checkpoints.models import MARKS
from gramjax.data.clips import MODALITIES, ClipConfig
from gramjax.models import GramModel, LossParameters, from_json, to_json

_FILE = "clips.json"

_UNKNOWN = ClipConfig("unknown", MODALITIES)


@dataclass(frozen=True)
class Usage:
    """What a model was trained on, or what is usual where nothing is known.

    Attributes:
        clips: data set, modalities, frames, slices and lengths of texts.
        condition: modalities that its matching head reads, in this order.
    """

    clips: ClipConfig = _UNKNOWN
    condition: tuple[str, ...] = MATCHED


def save_with_usage(
    path: Path, model: GramModel, usage: Usage, *, loss_parameters: LossParameters | None = None
) -> None:
    """`gramjax.checkpoints.save_model`, and how the model is used; replaces a model that is at `path`."""
    check_destination(path, MARKS, overwrite=True)
    with whole_folder(path) as folder:
        save_model(folder, model, loss_parameters=loss_parameters, overwrite=True)
        (folder / _FILE).write_text(json.dumps(to_json(usage), indent=2) + "\n", encoding="utf-8")


def read_usage(model: Path) -> Usage:
    """What the folder of a model says of its use; the defaults if it says nothing.

    Raises:
        ValueError: what it says is damaged.
    """
    path = model / _FILE
    if not path.exists():
        return Usage()
    try:
        return from_json(Usage, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} does not say how a model reads clips: {error}") from error

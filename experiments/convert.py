"""Converts a PyTorch checkpoint to a folder that `gramjax.checkpoints.load_model` reads: JSON and Orbax.

`python -m experiments.convert model_step_1000.pt converted gram`
`python -m experiments.convert model_step_1000.pt converted --published pmrl_msrvtt gram`
`python -m experiments.convert EVA01_CLIP_g_14_psz14_s11B.pt converted vision`
`python -m experiments.convert BEATs_iter3_plus_AS2M.pt converted audio`
`python -m experiments.convert bert-base-uncased converted text`
`python -m experiments.convert tiny.pt converted json --path model.json`

A model of other sizes than the released ones is described by a JSON file, which
`json.dump(gramjax.models.to_json(config), file)` writes of its configuration (`gramjax.models.GramConfig`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments.cli import interrupts_end_at_once, one_line_errors, removed_if_interrupted
from experiments.clip_config import PUBLISHED
from experiments.usage import Usage, save_with_usage
from gramjax.checkpoints import (
    load_torch,
    read_beats_config,
    read_config,
    read_gram_config,
    read_state_dict,
    save_model,
)
from gramjax.checkpoints.folders import check_destination, partial_folder
from gramjax.checkpoints.models import MARKS
from gramjax.checkpoints.torch_models import ModelConfig
from gramjax.encoders import BERTConfig, VisionConfig
from gramjax.encoders.conversion import parameter_count
from gramjax.models import GramConfig, GramModel, LossParameters


@dataclass(frozen=True)
class GramFile:
    """GRAM, PMRL or VAST of the released size; frames, slices and depth are read from the file."""


@dataclass(frozen=True)
class BEATsFile:
    """A BEATs file, which says itself what it holds."""


@dataclass(frozen=True)
class JSONFile:
    """Any model."""

    path: Path
    """JSON file with its configuration, as in a converted folder: json.dump(gramjax.models.to_json(config), file)."""


Model = (
    Annotated[GramFile, tyro.conf.subcommand("gram")]
    | Annotated[VisionConfig, tyro.conf.subcommand("vision", description="EVA-CLIP's vision tower.")]
    | Annotated[BEATsFile, tyro.conf.subcommand("audio")]
    | Annotated[BERTConfig, tyro.conf.subcommand("text", description="BERT.")]
    | Annotated[JSONFile, tyro.conf.subcommand("json")]
)


@dataclass(frozen=True)
class Convert:
    """Convert a PyTorch checkpoint."""

    source: tyro.conf.Positional[Path]
    """File (.pt, .pth, .bin, .safetensors) or Hugging Face folder. Nothing in it is executed."""
    destination: tyro.conf.Positional[Path]
    """Folder to make. It appears only once everything is in it."""
    model: tyro.conf.OmitArgPrefixes[Model]
    published: str | None = None
    """Published run that the model comes from, as of `experiments.train --config`. Its frames, slices, lengths of texts
    and what its matching head reads are kept with the model, and are then the defaults of what uses it."""
    overwrite: bool = False
    """Replace the model that is at the destination, with all that is in its folder."""
    other_image_size: bool = False
    """Interpolate the vision tower's position embeddings if the file is for pictures of another size than the model;
    otherwise it is refused."""

    def __post_init__(self):
        if self.published is not None and self.published not in PUBLISHED:
            raise ValueError(f"published must be one of {', '.join(PUBLISHED)}, got {self.published}")


def main(options: Convert) -> None:
    check_destination(options.destination, MARKS, overwrite=options.overwrite, name="destination", option="--overwrite")
    if not options.source.exists():
        raise ValueError(f"source must be a file or a folder, got {options.source}, which does not exist")
    config = _config(options)
    if options.published is not None and not isinstance(config, GramConfig):
        raise ValueError(f"published is of a whole model, got it for a {type(config).__name__}")
    try:
        model = load_torch(options.source, config, other_image_size=options.other_image_size)
    except ValueError as error:
        if "wrong shape: " not in str(error):
            raise
        raise ValueError(
            f"{error}\nThe file has other sizes than this {type(config).__name__}; describe its own with json --path "
            "FILE, which --help explains"
        ) from error
    scalars = _loss_parameters(options, model)
    partial = partial_folder(options.destination)
    # With usage, the model is a whole folder within another.
    with removed_if_interrupted(partial), removed_if_interrupted(partial_folder(partial)):
        if options.published is None:
            save_model(options.destination, model, loss_parameters=scalars, overwrite=options.overwrite)
        else:
            _, run = PUBLISHED[options.published]
            save_with_usage(options.destination, model, Usage(run.clips, run.condition), loss_parameters=scalars)
    print(f"{options.destination}: {type(model).__name__}, {parameter_count(model):,} parameters")


def _loss_parameters(options: Convert, model: object) -> LossParameters | None:
    """The temperature of a whole model's file, if it has one."""
    if not isinstance(model, GramModel):
        return None
    state_dict = read_state_dict(options.source)
    return LossParameters.from_torch(state_dict) if "contra_temp" in state_dict else None


def _config(options: Convert) -> ModelConfig:
    match options.model:
        case GramFile():
            return read_gram_config(options.source)
        case BEATsFile():
            return read_beats_config(options.source)
        case JSONFile(path):
            return read_config(path)
        case config:
            return config


if __name__ == "__main__":
    with interrupts_end_at_once("interrupted"), one_line_errors():
        main(tyro.cli(Convert, description=__doc__))

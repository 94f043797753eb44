"""Towers and heads put together, their configuration, and the learnable scalars of the losses."""

from gramjax.models.config import GramConfig, from_json, to_json
from gramjax.models.gram import GramModel
from gramjax.models.loss_parameters import LossParameters

__all__ = ["GramConfig", "GramModel", "LossParameters", "from_json", "to_json"]

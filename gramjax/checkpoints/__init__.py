"""Checkpoints of any tree of arrays, written by Orbax: one at a time, or a series kept during training."""

from gramjax.checkpoints.checkpointer import Checkpointer
from gramjax.checkpoints.trees import restore, save

__all__ = ["Checkpointer", "restore", "save"]

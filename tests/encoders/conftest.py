import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from gramjax.encoders.conversion import strip_prefix

GOLDEN = Path(__file__).parent.parent / "golden"


class Golden(NamedTuple):
    """Inputs, outputs and parameters of the published PyTorch code (see tests/golden/README.md)."""

    config: dict[str, Any]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    state_dict: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def golden():
    def load(name: str) -> Golden:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            return Golden(
                json.loads(str(file["config"])),
                strip_prefix(file, "in/"),
                strip_prefix(file, "out/"),
                strip_prefix(file, "sd/"),
            )

    return load

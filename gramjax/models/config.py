"""What a model is made of, as plain frozen dataclasses, and their JSON."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from gramjax.encoders.audio import BEATsConfig
from gramjax.encoders.text import BERTConfig
from gramjax.encoders.vector import VectorConfig
from gramjax.encoders.vision import VisionConfig

TowerConfig = VisionConfig | BEATsConfig | BERTConfig | VectorConfig
Pooling = typing.Literal["first", "mean"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class GramConfig:
    """A GRAM model: towers, and which of them embeds which modality.

    Modalities may share a tower (frames and depth maps; captions in several languages), and each has a projection
    head of its own, as in the published model.

    Attributes:
        towers: configuration of every tower, by a name of your choice.
        modalities: modality -> name of its tower.
        embed_dim: dimension of the common space.
        pooling: tower -> how its tokens become one vector: "first", the class token, or "mean", over all tokens but
            the class token and padding. Towers not named pool as in the published model: vision and text "first",
            audio "mean"; a vector has one token, the first.

    Raises:
        ValueError: a modality or `pooling` names a tower there is not, a tower serves no modality, an audio tower
            (which has no class token) shall pool the first or a vector tower (which has no other) the mean, or
            `embed_dim` is not positive.
    """

    towers: Mapping[str, TowerConfig]
    modalities: Mapping[str, str]
    embed_dim: int = 512
    pooling: Mapping[str, Pooling] = dataclasses.field(default_factory=dict)
    joint_heads: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    fusion_tower: str | None = None
    condition_frames: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim must be positive, got {self.embed_dim}")
        if not self.modalities:
            raise ValueError("modalities must name at least one")
        for modality, tower in self.modalities.items():
            if tower not in self.towers:
                raise ValueError(
                    f"modalities must name towers among {sorted(self.towers)}, got {tower!r} for {modality!r}"
                )
        if unused := sorted(set(self.towers) - set(self.modalities.values())):
            raise ValueError(f"towers must serve a modality each, got {unused}, which modalities do not name")
        for tower, pooling in self.pooling.items():
            if tower not in self.towers:
                raise ValueError(f"pooling must name towers among {sorted(self.towers)}, got {tower!r}")
            if pooling not in typing.get_args(Pooling):
                raise ValueError(f"pooling must be one of {typing.get_args(Pooling)}, got {pooling!r} for {tower!r}")
            if pooling == "first" and isinstance(self.towers[tower], BEATsConfig):
                raise ValueError(f"pooling must be 'mean' for audio towers, got 'first' for {tower!r}")
            if pooling == "mean" and isinstance(self.towers[tower], VectorConfig):
                raise ValueError(f"pooling must be 'first' for vector towers, got 'mean' for {tower!r}")

        self._check_joint_heads()
        self._check_fusion()

    def _check_joint_heads(self) -> None:
        for name, modalities in self.joint_heads.items():
            if name in self.modalities:
                raise ValueError(f"joint_heads must not have names of modalities, got {name!r}")
            if len(modalities) < 2 or not set(modalities) <= set(self.modalities):
                raise ValueError(
                    f"joint_heads must each join two or more of {list(self.modalities)}, got {modalities} for {name!r}"
                )

    def _check_fusion(self) -> None:
        if self.fusion_tower is None:
            if self.condition_frames:
                raise ValueError(f"condition_frames must be empty without fusion_tower, got {self.condition_frames}")
            return
        tower = self.towers.get(self.fusion_tower)
        if not isinstance(tower, BERTConfig) or not tower.cross_attention:
            raise ValueError(f"fusion_tower must name a text tower with cross-attention, got {self.fusion_tower!r}")
        if not self.condition_frames:
            raise ValueError("condition_frames must name at least one tower whose tokens the fusion tower reads")
        for name, frames in self.condition_frames.items():
            if name not in self.towers or frames < 0:
                raise ValueError(
                    f"condition_frames must give towers among {sorted(self.towers)} a number of at least 0, "
                    f"got {frames} for {name!r}"
                )

    def __hash__(self) -> int:
        mappings = (self.towers, self.modalities, self.pooling, self.joint_heads, self.condition_frames)
        return hash((self.embed_dim, self.fusion_tower, *(tuple(mapping.items()) for mapping in mappings)))


def to_json(config: Any) -> Any:
    """A dataclass of plain values, tuples, mappings and other dataclasses as JSON values; `from_json` reads it back.

    >>> to_json(GramConfig({"text": BERTConfig()}, {"caption": "text"}, embed_dim=64))["modalities"]
    {'caption': 'text'}
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return {"type": type(config).__name__, **fields}
    if isinstance(config, Mapping):
        return {name: to_json(value) for name, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_json(value) for value in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    if isinstance(config, Path):
        return str(config)
    raise TypeError(f"config must hold values that JSON can, got {type(config).__name__}")


def from_json(kind: type[T], values: Any) -> T:
    """Rebuild a configuration from what `to_json` made of it.

    Only the classes named in the annotations of `kind` are ever built, whatever the file says.

    Args:
        kind: the class to build.
        values: JSON values; fields that are missing take their defaults.

    Raises:
        ValueError: a field or a class that `kind` does not know, or a value of the wrong kind.
    """
    return _read(kind, values, kind.__name__)


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        return _read_union(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where} must be one of {arguments}, got {value!r:.80}")
        return value
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        if len(kinds) != len(value):
            raise ValueError(f"{where} must have {len(kinds)} values, got {len(value)}")
        return tuple(_read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value)))
    if origin in (Mapping, dict) and isinstance(value, dict):
        return {name: _read(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind in (bool, int, float, str):
        return _read_union((kind,), value, where)
    raise ValueError(f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r:.80}")


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict) or value.get("type") != kind.__name__:
        raise ValueError(f"{where} must have the fields of {kind.__name__}, got {value!r:.80}")
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(value) - set(hints) - {"type"}):
        raise ValueError(f"{where} must have known fields only: {kind.__name__} has no {', '.join(unknown)}")
    return kind(**{name: _read(hints[name], item, f"{where}.{name}") for name, item in value.items() if name != "type"})


def _read_union(kinds: tuple, value: Any, where: str) -> Any:
    for kind in kinds:
        if isinstance(value, dict) and value.get("type") == kind.__name__:
            return _read_dataclass(kind, value, where)
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if type(value) is kind:
            return value
    names = [kind.__name__ for kind in kinds]
    raise ValueError(f"{where} must be one of {', '.join(names)}, got {value!r:.80}")

"""What can be chosen about a training run. Every field is an option of `python -m experiments.train`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gramjax.encoders.audio import BEATsConfig
from gramjax.encoders.text import BERTConfig
from gramjax.encoders.vision import VisionConfig
from gramjax.models import GramConfig

Modality = Literal["english", "spanish", "chinese", "twitter", "google", "speech"]


class ConfigError(ValueError):
    """A configuration that cannot be trained with the data, devices or directory at hand; its message says why."""


# The two artists' pictures share a tower, and so do the three languages.
TOWER_OF: dict[Modality, str] = {
    "english": "text",
    "spanish": "text",
    "chinese": "text",
    "twitter": "vision",
    "google": "vision",
    "speech": "audio",
}

# Sizes that two CPU cores train in minutes.
SMALL_VISION = VisionConfig(
    image_size=32,
    patch_size=8,
    width=128,
    depth=3,
    num_heads=4,
    mlp_dim=256,
    drop_path_rate=0.0,
    stem_channels=(16, 32, 64),
    dropout_rate=0.2,
)
SMALL_TEXT = BERTConfig(
    vocab_size=3072,
    max_length=48,
    width=128,
    depth=1,
    num_heads=4,
    mlp_dim=256,
    dropout_rate=0.2,
    attention_dropout_rate=0.0,
)
SMALL_AUDIO = BEATsConfig(
    patch_size=4,
    stem_channels=(128, 128),
    mel_bins=64,
    patch_dim=128,
    width=128,
    depth=1,
    num_heads=4,
    mlp_dim=256,
    position_kernel=8,
    position_groups=1,
    num_buckets=64,
    max_distance=128,
    attention_dropout_rate=0.0,
    layer_drop_rate=0.0,
)


@dataclass(frozen=True)
class Contrastive:
    """A contrastive term: scores divided by a temperature, then cross-entropy in both directions."""

    weight: float = 0.0
    """Factor of this term in the objective; 0 leaves it out."""
    temperature: float = 0.07
    learn_temperature: bool = True
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Sigmoid:
    """The pairwise sigmoid loss (SigLIP), mean over all pairs of modalities."""

    weight: float = 0.0
    temperature: float = 0.1
    learn_temperature: bool = True
    bias: float = -10.0
    """Initial value; learned."""


@dataclass(frozen=True)
class PMRL:
    """The PMRL loss: leading singular value of every item, and directions of different items kept apart."""

    weight: float = 0.0
    alignment_temperature: float = 0.05
    regularization_temperature: float = 0.1
    regularization_weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """What is minimised: the sum of the terms with a weight."""

    gram: Contrastive = Contrastive()
    """Volume of the anchor and the other modalities."""
    cone: Contrastive = Contrastive(temperature=0.2)
    """Angle between the anchor and the cone of the other modalities."""
    pmrl: PMRL = PMRL()
    anchored_infonce: Contrastive = Contrastive()
    """Anchor against each other modality."""
    pairwise_infonce: Contrastive = Contrastive()
    """Every modality against every other."""
    sigmoid: Sigmoid = Sigmoid()
    triangle: Contrastive = Contrastive()
    """Area of the triangle of exactly three modalities."""
    symile: Contrastive = Contrastive(temperature=0.1)
    """Product of all modalities."""


# Chosen on validation (README, Results).
CONE_AND_PAIRS = Objective(
    cone=Contrastive(weight=1.0, temperature=0.12), pairwise_infonce=Contrastive(weight=1.0, temperature=0.08)
)


@dataclass(frozen=True)
class Optimizer:
    """AdamW, with linear warm-up and a cosine down to 0 at the last step."""

    learning_rate: float = 1e-3
    """Peak."""
    warmup_steps: int | None = None
    """None: an eighth of all steps."""
    weight_decay: float = 0.1
    """Of the kernels alone."""
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    max_grad_norm: float | None = 1.0
    """The gradient is clipped to this global norm."""

    def warmup(self, steps: int) -> int:
        """Over how many of all steps the learning rate rises."""
        return steps // 8 if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class TrainConfig:
    """Train a model that embeds pictures, words and speech in one space."""

    run_dir: Path = Path("runs/default")
    """Where everything is written. A run found there is gone on with, if its configuration is the same."""
    data_dir: Path = Path("runs/data")
    """Where the prepared data set is, or will be."""
    modalities: tuple[Modality, ...] = ("english", "twitter", "speech")
    anchor: Modality = "english"
    """The modality that anchored terms compare with the others."""
    objective: Objective = CONE_AND_PAIRS
    steps: int = 400
    batch_size: int = 128
    """Of all devices and processes together."""
    chunk_size: int | None = None
    """Rows of a batch that go through the towers at a time, of all devices and processes together: a large batch in
    little memory, for one more forward pass, but slow on CPUs where towers have convolutions. None: all at once."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the towers' computations; parameters and losses stay float32."""
    optimizer: Optimizer = Optimizer()
    embed_dim: int = 128
    vision: VisionConfig = SMALL_VISION
    text: BERTConfig = SMALL_TEXT
    audio: BEATsConfig = SMALL_AUDIO
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 50
    """Steps between measurements of validation recall; each is also a checkpoint, and the best one is kept."""
    checkpoint_every: int = 50
    """Steps between checkpoints: what a killed run loses at most."""
    select_by: Literal["pairs", "volume", "residual", "cone", "leading_direction"] = "pairs"
    """The validation recall that chooses the best checkpoint: of all single pairs of modalities by cosine, or of the
    anchor against all others together by one of these scores."""
    evaluate: bool = True
    """Evaluate the best checkpoint on the test split at the end."""

    def __post_init__(self):
        if len(self.modalities) < 2 or len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"modalities must be two or more different ones, got {self.modalities}")
        if self.anchor not in self.modalities:
            raise ValueError(f"anchor must be one of modalities {self.modalities}, got {self.anchor!r}")
        check_ranges(self)
        if self.chunk_size is not None and (self.chunk_size < 1 or self.batch_size % self.chunk_size):
            raise ValueError(
                f"chunk_size must be at least 1 and divide batch_size = {self.batch_size}, got {self.chunk_size}"
            )
        warmup_steps = self.optimizer.warmup(self.steps)
        if not warmup_steps < self.steps:
            raise ValueError(f"optimizer.warmup_steps must be below steps = {self.steps}, got {warmup_steps}")
        if not has_terms(self.objective):
            raise ValueError("objective has no term: give at least one a weight, such as --objective.gram.weight 1")
        check_objective(self.objective, self.modalities)


_COUNT = (lambda value: value >= 1, "at least 1")
_POSITIVE = (lambda value: 0 < value < math.inf, "positive and finite")
_NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "finite and not negative")
_FRACTION = (lambda value: 0 <= value < 1, "in [0, 1)")
# What the numbers of a run may be, by the name of the option; the towers check their own.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("steps", "batch_size", "embed_dim", "log_every", "validate_every", "checkpoint_every"), _COUNT),
    **dict.fromkeys(("temperature", "alignment_temperature", "regularization_temperature"), _POSITIVE),
    **dict.fromkeys(("learning_rate", "eps", "max_grad_norm"), _POSITIVE),
    **dict.fromkeys(("weight", "regularization_weight", "weight_decay", "warmup_steps"), _NOT_NEGATIVE),
    **dict.fromkeys(("label_smoothing", "b1", "b2"), _FRACTION),
    "bias": (math.isfinite, "finite"),
    "seed": (lambda value: 0 <= value < 2**32, "in [0, 2**32)"),
}


def check_ranges(part: Any, prefix: str = "") -> None:
    """Raise ValueError if a number of a configuration, or of a part of it, is out of its range."""
    for name, value in vars(part).items():
        if isinstance(value, (Objective, Optimizer, Contrastive, Sigmoid, PMRL)):
            check_ranges(value, f"{prefix}{name}.")
        elif name in _RANGES and value is not None:
            allowed, needed = _RANGES[name]
            if not allowed(value):
                raise ValueError(f"{prefix}{name} must be {needed}, got {value}")


def has_terms(objective: Objective) -> bool:
    """Whether any term has a weight."""
    return any(term.weight for term in vars(objective).values())


def check_objective(objective: Objective, modalities: Sequence[str]) -> None:
    """Raise ValueError if a term cannot be computed of these modalities."""
    if objective.triangle.weight and len(modalities) != 3:
        raise ValueError(f"objective.triangle needs exactly three modalities, got {tuple(modalities)}")
    if objective.cone.weight and len(modalities) > 7:
        raise ValueError(f"objective.cone takes at most seven modalities, got {tuple(modalities)}")


def gram_config(config: TrainConfig) -> GramConfig:
    """The model of a run: one tower for each kind of modality it has."""
    modalities = {modality: TOWER_OF[modality] for modality in config.modalities}
    towers = {"vision": config.vision, "text": config.text, "audio": config.audio}
    return GramConfig(
        towers={name: tower for name, tower in towers.items() if name in modalities.values()},
        modalities=modalities,
        embed_dim=config.embed_dim,
        pooling={name: "mean" for name in ("vision", "text") if name in modalities.values()},
    )

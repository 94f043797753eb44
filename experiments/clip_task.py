"""Training a released model on clips: pretraining and finetuning by `python -m experiments.train --config NAME`."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import runs, validation
from experiments.clip_config import ClipFiles, ClipTrainConfig, GramTerms, PMRLTerms
from experiments.config import ConfigError
from experiments.encoding import read_tokenizer
from experiments.loop import Task, fit
from experiments.processes import in_the_lead, say
from experiments.usage import Usage, save_with_usage
from gramjax.checkpoints import load_loss_parameters, load_model, read_config, resize_frames
from gramjax.data import clips
from gramjax.data.clips import ClipConfig, ClipFolder
from gramjax.data.wordpiece import WordPieceTokenizer
from gramjax.encoders import BERTConfig, VisionConfig
from gramjax.models import GramConfig, GramModel, LossParameters, to_json
from gramjax.training import (
    LossFunction,
    TrainState,
    adamw,
    create_train_state,
    data_mesh,
    gram_objective,
    make_train_step,
    merge,
    parameter_shardings,
    pmrl_objective,
    released_decays,
    released_rates,
    shard_batch,
    warmup_linear,
)

# What may differ between two starts of one run: where files are, how they are read, and what is done at the end.
MOVABLE = ("run_dir", "initialize", "vocabulary", "files", "validation", "workers", "threads", "export")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration with what was found of its files.

    Attributes:
        config: as it was given.
        model: configuration of the model, for clips of the training's frames.
        clips: with the modalities that model and clips have.
        condition: modalities that captions are matched with; none without matching.
        train: clips to train on.
        validation: clips that choose the best checkpoint.
        tokenizer: of captions and subtitles.
        steps: in all.
    """

    config: ClipTrainConfig
    model: GramConfig
    clips: ClipConfig
    condition: tuple[str, ...]
    train: ClipFolder
    validation: ClipFolder
    tokenizer: WordPieceTokenizer
    steps: int


def train_on_clips(config: ClipTrainConfig) -> str | None:
    """Train to the last step, from the newest checkpoint in the run's directory if there is one, and export the best.

    Returns:
        Name of the signal that stopped it, the checkpoint to go on from being saved, or None if it came to the end.

    Raises:
        ConfigError: files are missing or do not fit the model, or as `experiments.loop.fit`.
    """
    mesh = data_mesh()
    plan = make_plan(config, mesh.size)
    for name, folder in (("train", plan.train), ("validation", plan.validation)):
        say(f"{name}: {folder.report.summary()}; named in {config.run_dir / f'{name}_clips.json'}")
    said = [(clip.id, clip.captions, clip.subtitle) for clip in plan.train.annotations]
    record = {
        **to_json(config),
        "model": to_json(plan.model),
        "modalities": list(plan.clips.modalities),
        "clips_digest": hashlib.sha256(json.dumps(said).encode()).hexdigest(),
    }

    def build_task() -> Task:  # once the directory is this run's
        write_reports(plan)
        return make_task(plan, mesh)

    stopped = fit(config.run_dir, build_task, record=record, movable=MOVABLE, mesh=mesh)
    write_reports(plan)  # with what proved unreadable
    if stopped is None and config.export:
        export(plan, mesh)
    return stopped


def write_reports(plan: Plan) -> None:
    """Name the clips that lack something, were dropped or could not be read, in the run's directory."""

    def write() -> None:
        for name, folder in (("train", plan.train), ("validation", plan.validation)):
            folder.report.write(plan.config.run_dir / f"{name}_clips.json")

    in_the_lead(write)


def make_plan(config: ClipTrainConfig, device_count: int) -> Plan:
    """Look at the files and the model, and say what of the configuration they cannot serve.

    Raises:
        ConfigError: something is missing, or does not fit.
    """
    try:
        model = read_config(config.initialize / "config.json")
        if not isinstance(model, GramConfig):
            found = type(model).__name__
            raise ConfigError(f"initialize must hold a whole model, got {found} in {config.initialize}")
        train = _folder(config.files, config.files, captions=config.captions, require=config.require)
        held_out = _folder(config.validation, config.files, captions="first")
        tokenizer = read_tokenizer(config.vocabulary, model)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    left_out = _left_out(config, model, train)
    if left_out:
        say(f"left out: {', '.join(f'{name} ({reason})' for name, reason in left_out.items())}")
    modalities = tuple(name for name in config.clips.modalities if name not in left_out)
    if "caption" not in modalities or len(modalities) < 2:
        raise ConfigError(
            f"caption and another of {config.clips.modalities} must be in the clips and the model, got {modalities}"
        )
    condition = ()
    if config.objective.matching_weight:
        read = {name for name, tower in model.modalities.items() if tower in model.condition_frames}
        condition = tuple(name for name in config.condition if name in modalities and name in read)
        if not condition:
            raise ConfigError(f"condition {config.condition} must have something that clips and model have, got none")
        joined = (*model.joint_heads.values(), condition[:1])
        if isinstance(config.objective, PMRLTerms) and condition not in joined:
            raise ConfigError(f"condition must be what a joint head of the model joins, got {condition}")
    clip_config = dataclasses.replace(config.clips, modalities=modalities)
    frames = {"vision": clip_config.train_frames, "audio": clip_config.audio_slices}
    counts = {name: frames.get(name, count) if count else 0 for name, count in model.condition_frames.items()}
    model = dataclasses.replace(model, condition_frames=counts)
    _check_sizes(config, model, len(train), device_count)
    steps = config.steps or max(1, int(config.epochs * len(train) / config.batch_size))
    return Plan(config, model, clip_config, condition, train, held_out, tokenizer, steps)


def _folder(files: ClipFiles, others: ClipFiles, **options: Any) -> ClipFolder:
    return ClipFolder(
        files.annotations,
        videos=files.videos or others.videos,
        audios=files.audios or others.audios,
        depths=files.depths or others.depths,
        **options,
    )


def _left_out(config: ClipTrainConfig, model: GramConfig, train: ClipFolder) -> dict[str, str]:
    """Modalities that were asked for, by name or by their folder, but are not trained, and why."""
    asked = [*config.clips.modalities, *(["depth"] if config.files.depths is not None else [])]
    reasons = {}
    for name in asked:
        if name not in config.clips.modalities:
            reasons[name] = "not in clips.modalities"
        elif name not in model.modalities:
            reasons[name] = "the model does not have it"
        elif not any(clip.has(name) for clip in train.annotations):
            reasons[name] = "no training clip has it"
    return reasons


def _check_sizes(config: ClipTrainConfig, model: GramConfig, clip_count: int, device_count: int) -> None:
    if config.batch_size % device_count:
        raise ConfigError(f"batch_size must divide over {device_count} devices, got {config.batch_size}")
    if config.batch_size > clip_count:
        raise ConfigError(f"batch_size must not exceed the {clip_count} training clips, got {config.batch_size}")
    for name, length in (("caption", config.clips.caption_length), ("subtitle", config.clips.subtitle_length)):
        tower = model.towers[model.modalities[name]] if name in model.modalities else None
        if isinstance(tower, BERTConfig) and length > tower.max_length:
            raise ConfigError(f"clips.{name}_length must be at most the model's {tower.max_length}, got {length}")
    for tower in model.towers.values():
        if isinstance(tower, VisionConfig) and tower.image_size != config.clips.image_size:
            raise ConfigError(f"clips.image_size must be the model's {tower.image_size}, got {config.clips.image_size}")


def make_task(plan: Plan, mesh: Mesh) -> Task:
    """A released model, and clips."""
    config = plan.config
    graphdef, target, start, optimizer = build(plan, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target) if config.shard_parameters else None
    return Task(
        target=target,
        start=start,
        step=make_train_step(graphdef, optimizer, make_loss(plan, mesh), shardings=shardings),
        iterator=iter(make_loader(plan, train=True)),
        schedule=learning_rate_schedule(plan),
        validate=make_validation(plan, graphdef, mesh),
        steps=plan.steps,
        log_every=config.log_every,
        validate_every=config.validate_every or max(1, plan.steps // 10),
        checkpoint_every=config.checkpoint_every,
    )


def build(
    plan: Plan, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState, Callable[[], TrainState], optax.GradientTransformation]:
    """Graph definition, shapes and places of the state, what makes it at step 0, and the optimizer."""
    config = plan.config
    optimizer = make_optimizer(plan)
    temperature = config.temperature or _temperature(config)
    dtype = jnp.dtype(config.dtype)
    model = nnx.eval_shape(lambda: GramModel(plan.model, rngs=nnx.Rngs(0), dtype=dtype, remat=config.remat))
    model_graph, shapes = nnx.split(model)

    def begin(params: nnx.State) -> tuple[nnx.GraphDef, TrainState]:
        scalars = LossParameters(temperature=temperature)
        return create_train_state(nnx.merge(model_graph, params), scalars, optimizer, seed=config.seed)

    graphdef, state = jax.eval_shape(begin, shapes)
    place = places(config, mesh)
    shardings = place(state)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
    )

    def start() -> TrainState:
        # Each device reads its parts of the parameters, and makes those of the optimizer's state.
        loaded = _initial(functools.partial(load_model, shardings=place), config)
        params = nnx.state(resize_frames(loaded, dict(plan.model.condition_frames)))
        return jax.jit(lambda params: begin(params)[1], out_shardings=shardings)(params)

    return graphdef, target, start, optimizer


def places(config: ClipTrainConfig, mesh: Mesh) -> Callable[[Any], Any]:
    """Where the parts of the arrays of a tree are during the run."""
    if config.shard_parameters:
        return functools.partial(parameter_shardings, mesh=mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    return lambda tree: jax.tree.map(lambda _: whole, tree)


def _temperature(config: ClipTrainConfig) -> float:
    kept = _initial(load_loss_parameters, config)
    return 0.07 if kept is None else float(kept.temperature)


def _initial(load: Callable[[Path], Any], config: ClipTrainConfig) -> Any:
    try:
        return load(config.initialize)
    except ValueError as error:
        raise ConfigError(f"initialize must hold a whole model: {error}") from error


def make_optimizer(plan: Plan) -> optax.GradientTransformation:
    """AdamW with the published groups."""
    options = plan.config.optimizer
    return adamw(
        learning_rate_schedule(plan),
        weight_decay=options.weight_decay,
        b1=options.b1,
        b2=options.b2,
        eps=options.eps,
        max_grad_norm=options.max_grad_norm,
        decays=released_decays(plan.model, modalities=plan.clips.modalities, condition=plan.condition),
        rates=released_rates(plan.model, vision=options.vision_learning_rate / options.learning_rate),
    )


def learning_rate_schedule(plan: Plan) -> optax.Schedule:
    """Of all parameters but the vision tower's."""
    options = plan.config.optimizer
    return warmup_linear(options.learning_rate, steps=plan.steps, warmup_ratio=options.warmup_ratio)


def make_loss(plan: Plan, mesh: Mesh) -> LossFunction:
    """The objective of the run as a function of model, learnable scalars, batch and random streams."""
    terms = plan.config.objective
    objective = gram_objective if isinstance(terms, GramTerms) else pmrl_objective
    divided = mesh if mesh.size > 1 else None

    def loss(model: Any, scalars: Any, batch: Any, rngs: nnx.Rngs):
        return objective(model, scalars, batch, rngs, condition=plan.condition, mesh=divided, **vars(terms))

    return loss


def make_loader(plan: Plan, *, train: bool):
    """Batches to train on, without end, or of validation, once: this process's rows of them."""
    return clips.make_loader(
        plan.train if train else plan.validation,
        plan.clips,
        tokenizer=plan.tokenizer,
        batch_size=plan.config.batch_size,
        seed=plan.config.seed,
        train=train,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=plan.config.workers,
        threads=plan.config.threads,
    )


def make_validation(plan: Plan, graphdef: nnx.GraphDef, mesh: Mesh) -> Callable[[TrainState], dict[str, float]]:
    """A function from the state to recalls by volume."""

    def embed(state: TrainState, batch: Any) -> dict[str, Any]:
        model, _ = merge(graphdef, state)
        modalities = {name: batch[name] for name in plan.clips.modalities}
        return {"embeddings": model.embed(modalities), "where": batch["where"], "valid": batch["valid"]}

    embed = jax.jit(embed, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def validate(state: TrainState) -> dict[str, float]:
        batches = (shard_batch(batch, mesh) for batch in make_loader(plan, train=False))
        embedded: Any = runs.embed_batches(embed, state, batches)
        return validation.clip_recalls(embedded["embeddings"], embedded["where"])

    return validate


def export(plan: Plan, mesh: Mesh) -> None:
    """Write the best model to `model` in the run's directory, with its temperature."""
    path = plan.config.run_dir / "model"
    if jax.process_count() > 1:
        say(f"to write {path}, give the same command in one process: it only writes what is trained")
        return
    graphdef, target, _, _ = build(plan, mesh)
    with runs.open_checkpoints(plan.config.run_dir, read_only=True) as checkpoints:
        model, scalars = merge(graphdef, checkpoints.restore(target, step="best"))
        step = checkpoints.best_step
    if _holds(path, model, scalars, places(plan.config, mesh)):
        say(f"{path}: the model of step {step}, as it was written before")
        return
    usage = Usage(plan.clips, plan.condition or plan.config.condition)
    save_with_usage(path, model, usage, loss_parameters=scalars)
    say(f"{path}: the model of step {step}")


def _holds(path: Path, model: GramModel, scalars: LossParameters, place: Callable[[Any], Any]) -> bool:
    """Whether this very model was saved there: what lies beside it is then left alone."""
    try:
        there, kept = load_model(path, shardings=place), load_loss_parameters(path)
    except (ValueError, OSError):
        return False
    if there.config != model.config or kept is None or kept.to_json() != scalars.to_json():
        return False
    pairs = zip(*(jax.tree.leaves(nnx.state(one, nnx.Param)) for one in (there, model)), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)

"""The training script on a made-up data set: it learns, stops, goes on bit for bit, and refuses what cannot work."""

import dataclasses
import json
import os
import shutil
import signal
import sys

import chex
import grain
import jax
import numpy as np
import pytest
from flax import nnx

from experiments import runs, train
from experiments.config import PMRL, SMALL_AUDIO, Contrastive, Objective, Optimizer, TrainConfig
from experiments.processes import Processes
from gramjax.checkpoints import restore
from gramjax.data import emoji, pipeline
from gramjax.encoders import BEATsConfig, BERTConfig, VisionConfig
from gramjax.training import MetricWriter, data_mesh, merge, replicate, shard_batch
from tests.damage import flip, numbers_file
from tests.experiments.test_objective import EVERY_TERM

ITEMS = {"train": range(64), "validation": range(64, 88), "test": range(88, 100)}
PATTERNS = np.random.default_rng(0).normal(size=(2, 11, 8, 8, 3))
CONFIG = TrainConfig(
    modalities=("english", "twitter"),
    steps=12,
    batch_size=16,
    seed=3,
    optimizer=Optimizer(learning_rate=3e-3, warmup_steps=2),
    embed_dim=16,
    vision=VisionConfig(image_size=8, patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=16, drop_path_rate=0.1),
    text=BERTConfig(vocab_size=3072, max_length=48, width=16, depth=1, num_heads=2, mlp_dim=16),
    log_every=1,
    validate_every=4,
    checkpoint_every=5,
    evaluate=False,
)
SPEECH = {"modalities": ("english", "speech")}


def example(index, rng=None):
    """A picture of two random patterns, named by two words; both numbers follow from the index."""
    first, second = index % 10, index % 11
    noise = 0 if rng is None else rng.normal(scale=0.3, size=(8, 8, 3))
    ids = np.array([1, 10 + first, 30 + second, 2, 0, 0], np.int32)
    return {
        "twitter": (PATTERNS[0, first] + PATTERNS[1, second] + noise).astype(np.float32),
        "english": {"ids": ids, "mask": ids != 0},
        "label": np.int32(first),
        "index": np.int32(index),
    }


class Augment(grain.transforms.RandomMap):
    def random_map(self, index, rng):
        return example(index, rng)


def make_loader(source, *, modalities, batch_size, seed, train, process_index=0, process_count=1):
    if train:
        dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None).random_map(Augment())
        return dataset.batch(batch_size, drop_remainder=True).to_iter_dataset(grain.ReadOptions(num_threads=1))
    batches = []
    for start in range(0, len(source), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(source) - 1)
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *[example(source[row]) for row in rows])
        batches.append({**batch, "valid": np.arange(start, start + batch_size) < len(source)})
    return batches


def set_up(patch, devices=1):
    patch.setattr(emoji, "load_split", lambda data_dir, split: ITEMS[split])
    patch.setattr(pipeline, "make_loader", make_loader)
    patch.setattr(pipeline, "PICTURE_SIZE", 8)
    patch.setattr(train, "data_mesh", lambda: data_mesh(jax.devices()[:devices]))


@pytest.fixture(autouse=True)
def made_up_data_on_one_device(monkeypatch):
    set_up(monkeypatch)


def metrics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def latest_arrays(run_dir, step=CONFIG.steps):
    return restore(run_dir / "checkpoints" / str(step) / "state")


def run(run_dir, **changes):
    """Whether it came to its end."""
    return not train.train(dataclasses.replace(CONFIG, run_dir=run_dir, **changes))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        set_up(patch)
        assert run(run_dir)
    return run_dir


def test_metrics_have_every_step_once(uninterrupted):
    lines = metrics_of(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all({"loss", "loss/pairwise_infonce", "temperature/pairwise_infonce", "grad_norm"} <= set(x) for x in lines)
    assert [line["step"] for line in lines if "validation/recall" in line] == [4, 8, 12]
    assert lines[0]["learning_rate"] == 0
    assert lines[2]["learning_rate"] == pytest.approx(3e-3)
    rates = [line["learning_rate"] for line in lines[2:]]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.slow
def test_it_learns(tmp_path):
    """Held-out combinations of patterns are found by their two words."""
    assert run(tmp_path, steps=200, log_every=50, validate_every=200, optimizer=Optimizer(1e-2, warmup_steps=10))
    recalls = [line["validation/recall_at_1"] for line in metrics_of(tmp_path) if "validation/recall" in line]
    assert max(recalls) > 0.25  # chance: 1 / 24


def test_a_run_that_diverges_stops(tmp_path):
    with pytest.raises(train.ConfigError, match=r"the loss is nan at step \d+: the run has diverged"):
        run(tmp_path, steps=4, log_every=1, optimizer=Optimizer(1e30, warmup_steps=0))


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys, uninterrupted):
    write = MetricWriter.write
    for number, stop in ((signal.SIGTERM, 3), (signal.SIGINT, 8)):

        def interrupt(writer, step, numbers, number=number, stop=stop):
            write(writer, step, numbers)
            if step == stop:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(MetricWriter, "write", interrupt)
        assert not run(tmp_path)
        assert f"{number.name}: saved step {stop} in {tmp_path}; the same command" in capsys.readouterr().out
    monkeypatch.setattr(MetricWriter, "write", write)
    assert run(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    chex.assert_trees_all_equal(latest_arrays(tmp_path), latest_arrays(uninterrupted))


class Killed(BaseException):
    pass


def test_a_run_that_dies_goes_on_from_its_last_checkpoint_bit_for_bit(tmp_path, monkeypatch, uninterrupted):
    """Dies after writing its metrics and before saving; `test_train_killed.py` kills a process."""
    write = MetricWriter.write

    def die(writer, current, numbers):
        write(writer, current, numbers)
        if current == 7:
            raise Killed

    monkeypatch.setattr(MetricWriter, "write", die)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.setattr(MetricWriter, "write", write)
    assert run(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    chex.assert_trees_all_equal(latest_arrays(tmp_path), latest_arrays(uninterrupted))


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, capsys, uninterrupted):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    flip(numbers_file(run_dir / "checkpoints" / "12"))
    assert run(run_dir)
    printed = capsys.readouterr().out
    assert "warning: checkpoint 12 is damaged (state/" in printed
    assert "12.damaged1; the run goes on from step 10" in printed
    assert (run_dir / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    chex.assert_trees_all_equal(latest_arrays(run_dir), latest_arrays(uninterrupted))


def test_a_finished_run_is_left_as_it_is(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert run(uninterrupted)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_a_signal_to_a_finished_run_stops_it_before_the_evaluation(uninterrupted, monkeypatch, capsys):
    enter = MetricWriter.__enter__

    def interrupt(writer):
        os.kill(os.getpid(), signal.SIGTERM)
        return enter(writer)

    config = dataclasses.replace(CONFIG, run_dir=uninterrupted, evaluate=True)
    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "__enter__", interrupt)
        patch.setattr(train.tyro, "cli", lambda *_, **__: (config, Processes()))
        with pytest.raises(SystemExit) as stop:
            train.main()
    assert stop.value.code == 128 + signal.SIGTERM
    assert f"SIGTERM: saved step {CONFIG.steps} in {uninterrupted}" in capsys.readouterr().out
    assert run(uninterrupted)  # which writes the configuration it was made with


@pytest.mark.slow
def test_the_number_of_devices_does_not_matter_nor_its_change(tmp_path, monkeypatch, uninterrupted):
    """Six steps on four devices, the rest on two, against one."""
    write = MetricWriter.write

    def interrupt(writer, step, numbers):
        write(writer, step, numbers)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        set_up(patch, devices=4)
        patch.setattr(MetricWriter, "write", interrupt)
        assert not run(tmp_path)
    set_up(monkeypatch, devices=2)
    assert run(tmp_path)
    for ours, theirs in zip(metrics_of(tmp_path), metrics_of(uninterrupted), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def spoken(index):
    """A text and a sound whose length follows from the index; what is behind its end must not count."""
    rng = np.random.default_rng(index)
    mask = np.arange(32) < 16 + 16 * (index % 2)
    ids = np.array([1, 10 + index % 10, 2, 0], np.int32)
    return {
        "english": {"ids": ids, "mask": ids != 0},
        "speech": {"fbank": np.where(mask[:, None], rng.normal(size=(32, 16)), 0).astype(np.float32), "mask": mask},
        "index": np.int32(index),
    }


TINY_SOUND = BEATsConfig(
    mel_bins=16,
    patch_size=16,
    patch_dim=16,
    width=16,
    depth=1,
    num_heads=2,
    mlp_dim=16,
    position_kernel=4,
    position_groups=1,
    num_buckets=8,
    max_distance=16,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
    input_dropout_rate=0.0,
    layer_drop_rate=0.0,
)


def test_chunks_and_devices_do_not_change_the_loss():
    config = dataclasses.replace(
        CONFIG,
        modalities=("english", "speech"),
        text=dataclasses.replace(CONFIG.text, dropout_rate=0.0, attention_dropout_rate=0.0),
        audio=TINY_SOUND,
    )
    graphdef, state, _ = runs.build(config)
    batch = jax.tree.map(lambda *rows: np.stack(rows), *map(spoken, range(16)))

    def loss(devices, chunk_size=None):
        mesh = data_mesh(jax.devices()[:devices])
        objective = train.make_loss(dataclasses.replace(config, chunk_size=chunk_size), mesh)
        compute = jax.jit(lambda state, batch: objective(*merge(graphdef, state), batch, nnx.Rngs(0))[0])
        return compute(replicate(state, mesh), shard_batch(batch, mesh))

    whole = loss(1)
    np.testing.assert_allclose(loss(1, 4), whole, rtol=1e-6)
    np.testing.assert_allclose(loss(2, 8), whole, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_training_drops_out_what_the_key_says(chunk_size):
    config = dataclasses.replace(CONFIG, chunk_size=chunk_size)
    graphdef, state, _ = runs.build(config)
    batch = jax.tree.map(lambda *rows: jax.numpy.stack(rows), *map(example, range(16)))

    @jax.jit
    def loss(state, key):
        objective = train.make_loss(config, data_mesh(jax.devices()[:1]))
        return objective(*merge(graphdef, state), batch, nnx.Rngs(dropout=key, negatives=0))[0]

    first, again, other = (loss(state, jax.random.key(seed, impl="rbg")) for seed in (1, 1, 2))
    assert first == again
    assert abs(first - other) > 1e-4


@pytest.mark.slow
def test_a_run_in_chunks_goes_on_on_other_devices(tmp_path, monkeypatch):
    """Dropout and all: two steps on one device and the rest on two, against one."""
    chunked = {"chunk_size": 4, "steps": 4}
    assert run(tmp_path / "through", **chunked)
    write = MetricWriter.write

    def interrupt(writer, step, numbers):
        write(writer, step, numbers)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", interrupt)
        assert not run(tmp_path / "stopped", **chunked)
    set_up(monkeypatch, devices=2)
    assert run(tmp_path / "stopped", **chunked)
    lines = metrics_of(tmp_path / "stopped"), metrics_of(tmp_path / "through")
    assert lines[0][:2] == lines[1][:2]
    for ours, theirs in zip(*lines, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_another_configuration_in_the_same_directory_is_refused(uninterrupted):
    with pytest.raises(ValueError, match="holds a run of another configuration") as error:
        run(uninterrupted, seed=4, optimizer=Optimizer(learning_rate=1e-3, warmup_steps=2))
    assert str(error.value).splitlines()[1:] == [
        "  optimizer.learning_rate: 0.003 there, 0.001 now",
        "  seed: 3 there, 4 now",
    ]


def test_another_version_of_the_data_is_refused(uninterrupted, monkeypatch):
    there = str(emoji.EmojiBuilder.VERSION)
    monkeypatch.setattr(emoji.EmojiBuilder, "VERSION", "9.0.0")
    with pytest.raises(ValueError, match="holds a run of another configuration") as error:
        run(uninterrupted)
    assert str(error.value).splitlines()[1:] == [f"  data_version: {there!r} there, '9.0.0' now"]


def test_data_folder_and_evaluation_may_change_between_starts(uninterrupted, tmp_path):
    assert run(uninterrupted, data_dir=tmp_path, evaluate=True)
    assert runs.load_run(uninterrupted)[0].data_dir == tmp_path
    assert run(uninterrupted)


def test_load_run_gives_the_best_or_the_latest_model(uninterrupted):
    lines = metrics_of(uninterrupted)
    recalls = {line["step"]: line["validation/recall"] for line in lines if "validation/recall" in line}
    best = max(recalls, key=lambda step: (recalls[step], step))
    for checkpoint, step in (("best", best), ("latest", CONFIG.steps)):
        config, model, scalars = runs.load_run(uninterrupted, checkpoint=checkpoint)
        assert config == dataclasses.replace(CONFIG, run_dir=uninterrupted)
        saved = latest_arrays(uninterrupted, step)["params"]
        np.testing.assert_array_equal(
            model.heads["english"].linear.kernel[...], saved["model"]["heads"]["english"]["linear"]["kernel"]["value"]
        )
        np.testing.assert_array_equal(
            scalars["pairwise_infonce"].log_temperature[...],
            saved["loss"]["pairwise_infonce"]["log_temperature"]["value"],
        )


def test_embed_split_embeds_every_item_once_and_in_order(uninterrupted):
    config, model, _ = runs.load_run(uninterrupted)
    embedded = runs.embed_split(config, model, "validation")
    np.testing.assert_array_equal(embedded["index"], list(ITEMS["validation"]))
    np.testing.assert_array_equal(embedded["label"], [i % 10 for i in ITEMS["validation"]])
    assert list(embedded["embeddings"]) == ["english", "twitter"]
    for row in (0, 17, 23):
        one = model.embed({"twitter": example(ITEMS["validation"][row])["twitter"][None]})["twitter"][0]
        np.testing.assert_allclose(embedded["embeddings"]["twitter"][row], one, atol=1e-6)


def test_load_run_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run_dir must be the folder of a run, got .*config\.json"):
        runs.load_run(tmp_path)


@pytest.mark.slow
def test_all_terms_and_bfloat16_towers_train(tmp_path):
    terms = dataclasses.replace(EVERY_TERM, triangle=Contrastive())  # two modalities here
    assert run(tmp_path, objective=terms, dtype="bfloat16", steps=3)
    assert all(np.isfinite(value) for line in metrics_of(tmp_path) for value in line.values())
    arrays = latest_arrays(tmp_path, 3)["params"]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(arrays)} == {"float32"}
    _, model, _ = runs.load_run(tmp_path)
    batch = jax.tree.map(lambda *rows: jax.numpy.stack(rows), *map(example, range(2)))
    tokens = jax.eval_shape(lambda: model.encode(batch))
    assert {name: str(value.dtype) for name, value in tokens.items()} == {"english": "bfloat16", "twitter": "bfloat16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": ("english",)}, r"modalities must be two or more different ones, got \('english',\)"),
        ({"modalities": ("english", "english")}, "modalities must be two or more different ones"),
        ({"anchor": "speech"}, r"anchor must be one of modalities .*, got 'speech'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1 and divide batch_size = 16, got 0"),
        ({"chunk_size": 5}, "chunk_size must be at least 1 and divide batch_size = 16, got 5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2}, r"optimizer\.warmup_steps must be below steps = 2, got 2"),
        ({"seed": 2**32}, r"seed must be in \[0, 2\*\*32\), got 4294967296"),
        ({"optimizer": Optimizer(b2=1.0)}, r"optimizer\.b2 must be in \[0, 1\), got 1\.0"),
        ({"optimizer": Optimizer(learning_rate=float("nan"))}, r"optimizer\.learning_rate must be positive and finite"),
        (
            {"objective": Objective(gram=Contrastive(1.0, label_smoothing=1.0))},
            r"objective\.gram\.label_smoothing must be in \[0, 1\), got 1\.0",
        ),
        (
            {"objective": Objective(pmrl=PMRL(1.0, alignment_temperature=0.0))},
            r"objective\.pmrl\.alignment_temperature must be positive and finite, got 0\.0",
        ),
        ({"objective": Objective()}, "objective has no term"),
        ({"objective": Objective(triangle=Contrastive(1.0))}, "objective.triangle needs exactly three modalities"),
    ],
)
def test_configurations_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 14}, "batch_size must divide over 4 devices, got 14"),
        ({"chunk_size": 2}, "chunk_size must divide over 4 devices, got 2"),
        ({"batch_size": 68}, "batch_size must not exceed the 64 items of the training split, got 68"),
        (
            {"text": dataclasses.replace(CONFIG.text, vocab_size=50)},
            r"text\.vocab_size must be at least the data's \d+, got 50",
        ),
        ({"text": dataclasses.replace(CONFIG.text, max_length=47)}, r"text\.max_length .* the data's 48, got 47"),
        ({"vision": dataclasses.replace(CONFIG.vision, image_size=16)}, r"vision\.image_size .* data's 8, got 16"),
        ({"vision": dataclasses.replace(CONFIG.vision, channels=4)}, r"vision\.channels must be the data's 3, got 4"),
        (SPEECH | {"audio": dataclasses.replace(SMALL_AUDIO, mel_bins=128)}, r"audio\.mel_bins .* data's 64, got 128"),
        (
            SPEECH | {"audio": dataclasses.replace(SMALL_AUDIO, patch_size=32, stem_channels=(8,) * 5)},
            r"audio\.patch_size .* data's 208, got 32",
        ),
        (
            SPEECH | {"audio": dataclasses.replace(SMALL_AUDIO, patch_size=13, stem_channels=())},
            r"audio\.patch_size must divide the data's 208 and 64, got 13",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_any_work(tmp_path, monkeypatch, changes, message):
    set_up(monkeypatch, devices=4)
    with pytest.raises(train.ConfigError, match=message):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("steps", "warmup"), [(400, 50), (30, 3), (1, 0)])
def test_the_warm_up_fits_by_default(steps, warmup):
    config = TrainConfig(steps=steps)
    rates = [float(runs.learning_rate_schedule(config)(step)) for step in range(steps)]
    assert rates.index(max(rates)) == warmup


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--objective.pairwise-infonce.temperature", "-1", "objective.pairwise_infonce.temperature must be positive"),
        ("--objective.gram.weight", "-0.5", "objective.gram.weight must be finite and not negative, got -0.5"),
        ("--optimizer.max-grad-norm", "0", "optimizer.max_grad_norm must be positive and finite, got 0.0"),
        ("--seed", "-1", "seed must be in [0, 2**32), got -1"),
        ("--embed-dim", "0", "embed_dim must be at least 1, got 0"),
        ("--batch-size", "1091", "batch_size must not exceed the 64 items of the training split, got 1091"),
    ],
)
def test_a_bad_option_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, option, value, message):
    arguments = [option, value, "--run-dir", str(tmp_path / "run"), "--data-dir", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.setattr(pipeline, "PICTURE_SIZE", 32)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code.startswith(f"error: {message}")
    assert len(stop.value.code.splitlines()) == 1
    assert not list(tmp_path.iterdir())

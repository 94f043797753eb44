"""Batches of clips: what they hold, what happens to clips that cannot be read, and that they repeat exactly."""

import dataclasses
import itertools
import json
import logging

import numpy as np
import pytest

from gramjax.data import audio, clips, media, vision

CONFIG = clips.ClipConfig(
    "tiny",
    clips.MODALITIES,
    train_frames=2,
    eval_frames=3,
    audio_slices=2,
    caption_length=6,
    subtitle_length=5,
    image_size=16,
    slice_frames=16,
    transform="crop_flip",
)
# What can be read of each of the clips that `media_files.write_clips` writes.
PRESENT = {
    "whole": {"caption", "vision", "audio", "subtitle", "depth"},
    "silent": {"caption", "vision"},
    "broken": {"caption"},
    "unseen": {"caption", "audio"},
    "short": {"audio", "subtitle"},
    "mute": {"caption", "vision", "audio", "depth"},
    "plain": {"caption", "vision", "audio"},
    "text": {"caption", "subtitle"},
}
UNREADABLE = {"vision": {"broken", "short"}, "audio": {"broken", "silent"}, "depth": {"broken"}}


def open_folder(root, **options):
    folders = {name: root / name for name in ("videos", "audios", "depths")}
    return clips.ClipFolder(root / "annotations.json", **folders, **options)


@pytest.fixture
def folder(clip_root):
    return open_folder(clip_root)


@pytest.fixture
def training(folder, tokenizer):
    def build(config=CONFIG, batch_size=4, seed=3, **options):
        return clips.make_loader(
            folder, config, tokenizer=tokenizer, batch_size=batch_size, seed=seed, train=True, **options
        )

    return build


@pytest.fixture
def evaluation(folder, tokenizer):
    def build(config=CONFIG, batch_size=3, **options):
        return clips.make_loader(
            folder, config, tokenizer=tokenizer, batch_size=batch_size, seed=0, train=False, **options
        )

    return build


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def leaves(batch, prefix=()):
    for name, value in batch.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def assert_equal(first, second):
    first, second = dict(leaves(first)), dict(leaves(second))
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=str(name))


def test_shapes(training, evaluation):
    for build, frames in ((training, 2), (evaluation, 3)):
        (batch,) = take(build(batch_size=4), 1)
        shapes = {name: (value.shape, value.dtype.name) for name, value in leaves(batch)}
        expected = {
            ("vision",): ((4, frames, 16, 16, 3), "float32"),
            ("depth",): ((4, frames, 16, 16, 3), "float32"),
            ("audio",): ((4, 2, 16, 64), "float32"),
            ("caption", "ids"): ((4, 6), "int32"),
            ("caption", "mask"): ((4, 6), "bool"),
            ("subtitle", "ids"): ((4, 5), "int32"),
            ("subtitle", "mask"): ((4, 5), "bool"),
            ("index",): ((4,), "int32"),
            ("label",): ((4,), "int32"),
            **{("where", modality): ((4,), "bool") for modality in clips.MODALITIES},
        }
        assert shapes == expected | ({("valid",): ((4,), "bool")} if build is evaluation else {})


def test_evaluation_is_every_clip_once_in_order(folder, evaluation, tokenizer):
    batches = list(evaluation())
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7, -1]]
    assert [batch["valid"].tolist() for batch in batches] == [[True] * 3, [True] * 3, [True, True, False]]
    rows = {name: np.concatenate([dict(leaves(batch))[name] for batch in batches]) for name, _ in leaves(batches[0])}
    assert rows[("label",)].tolist() == [1, 0, 2, -1, -1, -1, 0, -1, -1]
    for position, clip in enumerate([*folder.annotations, clips.Clip("")]):
        present = {modality for modality in clips.MODALITIES if rows[("where", modality)][position]}
        assert present == PRESENT.get(clip.id, set())
        caption = clip.captions[0] if clip.captions else ""
        for modality, text, length in (("caption", caption, 6), ("subtitle", clip.subtitle, 5)):
            for name, expected in tokenizer([text], length).items():
                np.testing.assert_array_equal(rows[(modality, name)][position], expected[0])
        options = {"size": 16, "transform": "crop_flip"}
        expected = 0.0
        if "vision" in present:
            expected = vision.preprocess_frames(media.read_frames(clip.video, 3), **options)
        np.testing.assert_array_equal(rows[("vision",)][position], expected)
        expected = 0.0
        if "depth" in present:
            expected = vision.preprocess_frames(media.read_depth(clip.depth, 3), **options)
        np.testing.assert_array_equal(rows[("depth",)][position], expected)
        expected = 0.0
        if "audio" in present:
            sound = media.read_audio(clip.audio or clip.video)
            expected = audio.log_mel_slices(*sound, slices=2, slice_frames=16)
        np.testing.assert_array_equal(rows[("audio",)][position], expected)


def test_what_cannot_be_read_is_absent_and_reported_once(folder, training, caplog):
    with caplog.at_level(logging.WARNING, logger="gramjax.data.clips"):
        batches = take(training(), 6)
    names = [clip.id for clip in folder.annotations]
    for batch in batches:
        for row, index in enumerate(batch["index"]):
            present = {modality for modality in clips.MODALITIES if batch["where"][modality][row]}
            assert present == PRESENT[names[index]]
    assert {modality: set(found) for modality, found in folder.report.unreadable.items()} == UNREADABLE
    assert "no sound track" in folder.report.unreadable["audio"]["silent"]
    assert "1 frames, needed 2" in folder.report.unreadable["vision"]["short"]
    assert len(caplog.records) == sum(map(len, UNREADABLE.values()))


def test_unreadable_clips_can_be_found_and_dropped(folder, training):
    found = clips.find_unreadable(folder, CONFIG, threads=2)
    assert {modality: set(reasons) for modality, reasons in found.items()} == UNREADABLE
    assert folder.report.unreadable == found
    rest = folder.without({*found["vision"], *found["audio"]})
    assert [clip.id for clip in rest.annotations] == ["whole", "unseen", "mute", "plain", "text"]
    assert clips.find_unreadable(rest, CONFIG) == {}
    assert clips.find_unreadable(folder, dataclasses.replace(CONFIG, modalities=("caption",))) == {}


def test_every_epoch_is_shuffled_and_drawn_anew(training):
    batches = take(training(batch_size=8, num_epochs=6), 9)
    assert len(batches) == 6
    orders = [batch["index"].tolist() for batch in batches]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] != orders[1]
    # Clip 0 has all modalities. Its sound has few slices to choose from, so that two epochs may well agree.
    for modality in ("vision", "audio", "depth"):
        drawn = [batch[modality][order.index(0)] for batch, order in zip(batches, orders, strict=True)]
        assert any(np.abs(drawn[0] - other).max() > 0 for other in drawn[1:])


def test_what_does_not_fill_a_batch_is_left_out(training):
    batches = take(training(batch_size=3, num_epochs=2), 9)
    assert len(batches) == 4
    for epoch in (batches[:2], batches[2:]):
        assert len({index for batch in epoch for index in batch["index"].tolist()}) == 6


def test_training_draws_among_captions(clip_root, training, tokenizer):
    config = dataclasses.replace(CONFIG, modalities=("caption",))

    def seen(loader):
        return {
            tuple(batch["caption"]["ids"][row].tolist())
            for batch in take(loader, 20)
            for row in np.flatnonzero(batch["index"] == 0)
        }

    captions = open_folder(clip_root)[0].captions
    expected = [tuple(tokenizer([caption], 6)["ids"][0].tolist()) for caption in captions]
    assert seen(training(config, batch_size=8)) == set(expected)
    first = clips.make_loader(
        open_folder(clip_root, captions="first"), config, tokenizer=tokenizer, batch_size=8, seed=3, train=True
    )
    assert seen(first) == {expected[0]}


def test_the_same_seed_gives_the_same_batches(training):
    first, again, other = (take(training(seed=seed, threads=threads), 3) for seed, threads in ((1, 1), (1, 4), (2, 4)))
    for one, two in zip(first, again, strict=True):
        assert_equal(one, two)
    assert any(one["index"].tolist() != two["index"].tolist() for one, two in zip(first, other, strict=True))
    # What is drawn for a clip depends on the seed too, not only its place.
    draws = [
        next(batch["vision"][row] for batch in batches for row in np.flatnonzero(batch["index"] == 0))
        for batches in (take(training(seed=seed, batch_size=8), 1) for seed in range(3))
    ]
    assert all(np.abs(one - two).max() > 0 for one, two in itertools.combinations(draws, 2))


def test_a_modality_does_not_depend_on_the_others(training):
    (together,) = take(training(batch_size=8), 1)
    for modality in clips.MODALITIES:
        (alone,) = take(training(dataclasses.replace(CONFIG, modalities=(modality,)), batch_size=8), 1)
        assert_equal({modality: together[modality]}, {modality: alone[modality]})
    assert set(alone) == {"depth", "index", "label", "where"}


def test_video_and_depth_are_drawn_apart(folder, training, monkeypatch):
    """The same file as both would look different."""
    monkeypatch.setattr(media, "read_frames", lambda file, count, rng: media.read_depth(depth, count, rng))
    depth = folder[0].depth
    (batch,) = take(training(batch_size=8), 1)
    row = batch["index"].tolist().index(0)
    assert np.abs(batch["vision"][row] - batch["depth"][row]).max() > 0.1


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_batches_out(training, evaluation, count):
    for build in (training, evaluation):
        whole = take(build(batch_size=4), 3)
        parts = [take(build(batch_size=4, process_index=index, process_count=count), 3) for index in range(count)]
        for batch, *shares in zip(whole, *parts, strict=True):
            joined = [dict(leaves(share)) for share in shares]
            for name, value in leaves(batch):
                np.testing.assert_array_equal(np.concatenate([share[name] for share in joined]), value)


@pytest.mark.parametrize("train", [True, False])
def test_it_continues_exactly_where_it_stopped(training, evaluation, train):
    build = training if train else evaluation
    whole = take(build(), 3)
    for stop in (0, 1, 2):
        iterator = iter(build())
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        resumed = iter(build())
        resumed.set_state(state)
        for expected in whole[stop:]:
            assert_equal(next(resumed), expected)
        assert_equal(next(iterator), whole[stop])


def test_worker_processes_give_the_same_batches(folder, training):
    alone = take(training(), 4)
    folder.report.unreadable.clear()
    iterator = iter(training(workers=2, threads=1))
    together = [next(iterator) for _ in range(2)]
    resumed = iter(training(workers=2, threads=1))
    resumed.set_state(iterator.get_state())
    together += [next(resumed) for _ in range(2)]
    for one, two in zip(alone, together, strict=True):
        assert_equal(one, two)
    # What went wrong in other processes is known in this one.
    assert {modality: set(found) for modality, found in folder.report.unreadable.items()} == UNREADABLE


def test_all_captions_come_once_in_order(folder, tokenizer):
    def batches(**options):
        return list(clips.caption_batches(folder, tokenizer, batch_size=4, max_length=6, **options))

    whole = batches()
    assert [batch["index"].tolist() for batch in whole] == [[0, 0, 0, 1], [2, 3, 3, 5], [6, 7, -1, -1]]
    assert np.concatenate([batch["valid"] for batch in whole]).sum() == 10
    texts = [caption for clip in folder.annotations for caption in clip.captions] + ["", ""]
    np.testing.assert_array_equal(
        np.concatenate([batch["caption"]["ids"] for batch in whole]), tokenizer(texts, 6)["ids"]
    )
    parts = [batches(process_index=index, process_count=2) for index in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name, value in leaves(batch):
            np.testing.assert_array_equal(np.concatenate([dict(leaves(share))[name] for share in shares]), value)
    with pytest.raises(ValueError, match="multiple of process_count 3, got 4"):
        batches(process_count=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": None}, "tokenizer must be given for the texts"),
        ({"batch_size": 9}, "8 clips of the source, got 9"),
        ({"batch_size": 0}, "got 0"),
        ({"batch_size": 4, "process_count": 3}, "multiple of process_count 3, got 4"),
        ({"process_index": 1}, "got 1 of 1"),
        ({"seed": -1}, "seed .* got -1"),
        ({"num_epochs": 0}, "num_epochs .* got 0"),
        ({"train": False, "num_epochs": 1}, "in evaluation, got 1"),
        ({"workers": -1}, "got -1 and 4"),
        ({"threads": 0}, "got 0 and 0"),
    ],
)
def test_bad_arguments(folder, tokenizer, options, message):
    arguments = {"tokenizer": tokenizer, "batch_size": 4, "seed": 0, "train": True} | options
    with pytest.raises(ValueError, match=message):
        clips.make_loader(folder, CONFIG, **arguments)

"""Batches: what they hold, that they repeat exactly, and that processes share them out exactly."""

import itertools

import jax
import numpy as np
import pytest

from gramjax.data import audio, augment, emoji, pipeline, tokenizer

DEFAULT = ("english", "twitter", "speech")


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, dict):
            assert_equal(value, second[name])
        else:
            np.testing.assert_array_equal(value, second[name])


def training(source, modalities=DEFAULT, batch_size=64, seed=3, **options):
    return pipeline.make_loader(source, modalities=modalities, batch_size=batch_size, seed=seed, train=True, **options)


def evaluation(source, modalities=DEFAULT, batch_size=64, **options):
    return pipeline.make_loader(source, modalities=modalities, batch_size=batch_size, seed=0, train=False, **options)


@pytest.fixture(scope="module")
def small(splits):
    return splits["validation"]


@pytest.mark.parametrize("build", [training, evaluation])
def test_shapes(small, build):
    batch = take(build(small, pipeline.MODALITIES), 1)[0]
    valid = {"valid"} if build is evaluation else set()
    assert set(batch) == {*pipeline.MODALITIES, "label", "index"} | valid
    for artist in emoji.PICTURES:
        assert batch[artist].shape == (64, 32, 32, 3)
        assert batch[artist].dtype == np.float32
    for language in emoji.LANGUAGES:
        ids, mask = batch[language]["ids"], batch[language]["mask"]
        assert ids.shape == mask.shape == (64, pipeline.TEXT_LENGTH)
        assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)
        assert (ids[:, 0] == tokenizer.CLS).all()
        assert (mask.sum(axis=1) > 1).all()
        np.testing.assert_array_equal(mask, ids != tokenizer.PAD)
    fbank, mask = batch["speech"]["fbank"], batch["speech"]["mask"]
    assert fbank.shape == (64, pipeline.SPEECH_FRAMES, 64)
    assert mask.shape == (64, pipeline.SPEECH_FRAMES)
    assert (fbank.dtype, mask.dtype) == (np.float32, np.bool_)
    assert not fbank[~mask].any()
    assert mask.any(axis=1).all()
    assert pipeline.SPEECH_FRAMES % 16 == 0
    assert batch["label"].dtype == batch["index"].dtype == np.int32


def test_pictures_are_about_standardized(splits):
    loader = evaluation(splits["train"], emoji.PICTURES, 1090)
    (batch,) = take(loader, 1)
    values = np.stack([batch[artist] for artist in emoji.PICTURES])
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 1) < 0.1


def test_evaluation_is_in_order_once_and_padded(small):
    batches = take(evaluation(small, batch_size=50), 10)
    assert len(batches) == 4
    valid = np.concatenate([batch["valid"] for batch in batches])
    index = np.concatenate([batch["index"] for batch in batches])
    assert valid.sum() == len(small)
    assert valid[: len(small)].all()
    np.testing.assert_array_equal(index[valid], [small[i]["index"] for i in range(len(small))])
    np.testing.assert_array_equal(index[len(small) :], index[: 200 - len(small)])
    # A batch larger than the split is filled by going round.
    (batch,) = take(evaluation(small, ("chinese",), 400), 2)
    assert batch["valid"].sum() == len(small)


def test_evaluation_texts_are_the_name_spelt_then_the_keywords(small):
    (batch,) = take(evaluation(small, emoji.LANGUAGES, 161), 1)
    for row in range(0, 161, 10):
        for language in emoji.LANGUAGES:
            words = small[row][language]
            expected = [tokenizer.CLS, *tokenizer.spelt_words(words["name"])]
            for keyword in words["keywords"]:
                expected += tokenizer.known_words(keyword)
            ids = batch[language]["ids"][row]
            assert ids[ids != 0].tolist() == (expected or [tokenizer.UNK])[: pipeline.TEXT_LENGTH]


@pytest.mark.parametrize(("split", "voice"), [("validation", emoji.VALIDATION_VOICE), ("test", emoji.TEST_VOICE)])
def test_evaluation_speech_is_a_voice_never_heard_in_training(splits, split, voice):
    assert voice not in emoji.TRAIN_VOICES
    source = splits[split]
    (batch,) = take(evaluation(source, ("speech",), 8), 1)
    for row in range(8):
        fbank = audio.normalize_fbank(audio.kaldi_fbank(source[row]["speech"][voice]))
        np.testing.assert_allclose(batch["speech"]["fbank"][row, : len(fbank)], fbank, atol=1e-3)
        np.testing.assert_array_equal(batch["speech"]["mask"][row], np.arange(pipeline.SPEECH_FRAMES) < len(fbank))


def test_training_speech_is_the_training_voices_alone(splits, monkeypatch):
    """With noise, gain and masks off, every utterance is one of the training voices', late by at most 16 frames."""
    monkeypatch.setattr(augment, "degrade_speech", lambda energies, length, noise, uniform: energies)
    monkeypatch.setattr(augment, "mask_spectrum", lambda fbank, length, uniform: fbank)
    source = splits["validation"]
    rows = {source[i]["index"]: i for i in range(len(source))}
    heard = set()
    for batch in take(training(source, ("speech",), 32), 2):
        speech = batch["speech"]
        for index, spectrum, mask in zip(batch["index"], speech["fbank"], speech["mask"], strict=True):
            spoken = source[rows[int(index)]]["speech"]
            sounding = np.flatnonzero(mask)
            start, stop = sounding[0], sounding[-1] + 1
            assert mask[start:stop].all()
            assert not spectrum[~mask].any()
            assert start <= pipeline.LATEST_START
            matches = []
            for voice in emoji.VOICES:
                fbank = audio.normalize_fbank(audio.kaldi_fbank(spoken[voice]))
                if len(fbank) == stop - start and np.abs(fbank - spectrum[start:stop]).max() < 1e-2:
                    matches.append(voice)
            assert len(matches) == 1
            heard.update(matches)
    assert heard == set(emoji.TRAIN_VOICES)


def test_training_goes_through_the_split_every_epoch(small):
    batches = take(training(small, ("english",), 32), 2 * (161 // 32))
    epochs = [np.concatenate([batch["index"] for batch in half]) for half in (batches[:5], batches[5:])]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 160
    assert not np.array_equal(*epochs)
    assert not np.array_equal(epochs[0], np.sort(epochs[0]))


def test_the_same_seed_gives_the_same_batches_and_another_does_not(small):
    first, again, other = (take(training(small, seed=seed), 3) for seed in (1, 1, 2))
    for one, two in zip(first, again, strict=True):
        assert_equal(one, two)
    assert not np.array_equal(first[0]["index"], other[0]["index"])


def test_every_epoch_is_augmented_anew(small):
    epochs = take(training(small, batch_size=161), 2)
    sorted_epochs = [np.argsort(batch["index"]) for batch in epochs]
    for name in ("twitter", "speech"):
        one, two = (jax.tree.leaves(batch[name])[0][order] for batch, order in zip(epochs, sorted_epochs, strict=True))
        assert (np.abs(one - two).max(axis=tuple(range(1, one.ndim))) > 0).all()
    one, two = (batch["english"]["ids"][order] for batch, order in zip(epochs, sorted_epochs, strict=True))
    assert (one != two).any(axis=1).mean() > 0.6  # of some, one name is all there is


@pytest.mark.parametrize("build", [training, evaluation])
def test_it_continues_exactly_where_it_stopped(small, build):
    loader = build(small, batch_size=32)
    whole = take(loader, 5)
    for stop in (0, 1, 3):
        iterator = iter(loader)
        for _ in range(stop):
            next(iterator)
        state = iterator.get_state()
        resumed = iter(build(small, batch_size=32))
        resumed.set_state(state)
        for expected in whole[stop:]:
            assert_equal(next(resumed), expected)
        # And the one that went on is not disturbed.
        assert_equal(next(iterator), whole[stop])


@pytest.mark.parametrize("build", [training, evaluation])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_batch_out_exactly(small, build, processes):
    whole = take(build(small, batch_size=32), 3)
    parts = [
        take(build(small, batch_size=32, process_index=index, process_count=processes), 3) for index in range(processes)
    ]
    for number, batch in enumerate(whole):
        together = jax.tree.map(lambda *shares: np.concatenate(shares), *(part[number] for part in parts))
        # Pixels and spectrograms are rounded otherwise in arrays of another size; all else is integers and masks.
        jax.tree.map(lambda ours, whole: np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-5), together, batch)


def test_the_position_does_not_depend_on_the_number_of_processes(small):
    """What one of two processes saves, a process alone goes on from."""
    one_of_two = iter(training(small, batch_size=32, process_index=1, process_count=2))
    for _ in range(3):
        next(one_of_two)
    alone = iter(training(small, batch_size=32))
    alone.set_state(one_of_two.get_state())
    assert_equal(next(alone), take(training(small, batch_size=32), 4)[3])


def test_a_modality_does_not_depend_on_the_others_named(small):
    for build in (training, evaluation):
        (together,), (alone,) = take(build(small), 1), take(build(small, ("speech",)), 1)
        assert_equal(together["speech"], alone["speech"])


def test_training_speech_is_late_masked_loud_and_noisy(small, monkeypatch):
    """Each alone: all of it, then without noise and gain, then without masks as well; the same draws every time."""
    one_batch = lambda: take(training(small, ("speech",), 161), 1)[0]["speech"]["fbank"]  # noqa: E731
    degraded = one_batch()
    monkeypatch.setattr(augment, "degrade_speech", lambda energies, length, noise, uniform: energies)
    masked = one_batch()
    monkeypatch.setattr(augment, "mask_spectrum", lambda fbank, length, uniform: fbank)
    clean = one_batch()
    late, frames, bins, gain, noise = [], [], [], [], []
    for rows in zip(degraded, masked, clean):
        sounding = np.flatnonzero(rows[2].any(axis=1))
        late.append(sounding[0])
        noisy, kept, whole = (row[sounding[0] : sounding[-1] + 1] for row in rows)
        frames.append(np.sum(~kept.any(axis=1)))
        bins.append(np.sum(~kept.any(axis=0)))
        np.testing.assert_array_equal(kept[kept != 0], whole[kept != 0])
        np.testing.assert_array_equal(noisy == 0, kept == 0)
        # Where speech is loudest noise adds nothing, so there is the gain.
        ratio, energies = (np.exp(audio.FBANK_SCALE * x)[kept != 0] for x in (noisy - kept, kept))
        gain.append(10 * np.log10(ratio[energies.argmax()]))
        added = np.mean(energies * (ratio / ratio[energies.argmax()] - 1))
        noise.append(10 * np.log10(np.mean(energies) / max(added, 1e-9)))
    # Uniform: 0 to 16 frames late, masks of 0 to 12 frames and 0 to 10 bins, -6 to 6 dB louder, noise 5 to 45 dB below.
    expected = ((late, 8, 16), (frames, 6, 12), (bins, 5, 10), (gain, 0, 12), (noise, 25, 40))
    for values, mean, extent in expected:
        assert np.mean(values) == pytest.approx(mean, abs=0.1 * extent)
        assert np.std(values) == pytest.approx(extent / np.sqrt(12), rel=0.25)


def test_augmentation_has_its_own_rates_and_uniform_draws(small, monkeypatch):
    """And the pipeline hands the right pictures the permission to be flipped."""
    flip, of_pictures, of_words = [], [], []

    def affine_ink(ink, may_flip, uniform):
        flip.append(may_flip.tolist())
        of_pictures.extend(uniform.flat)
        return ink

    def sample_phrases(phrases, uniform):
        of_words.extend(uniform)
        return [phrases.name]

    monkeypatch.setattr(augment, "affine_ink", affine_ink)
    monkeypatch.setattr(augment, "sample_phrases", sample_phrases)
    flips = {small[i]["index"]: small[i]["flip"] for i in range(len(small))}
    (batch,) = take(training(small, ("google", "spanish"), 161), 1)
    # The background thread may be a batch ahead, and that of another loader not done.
    assert [flips[int(index)] for index in batch["index"]] in flip
    assert 0 < np.mean(flip[0]) < 1
    for uniform in (of_pictures, of_words):
        np.testing.assert_allclose(np.quantile(uniform, (0.0, 0.25, 0.5, 0.75, 1.0)), np.linspace(0, 1, 5), atol=0.05)


@pytest.mark.parametrize("language", ["chinese", "english"])
def test_words_that_are_dropped_are_characters_in_chinese(small, language):
    examples = [small[position] for position in range(len(small))]
    for example, phrases in zip(examples, pipeline._decode(examples, language, ()).phrases):
        name = example[language]["name"]
        assert sum(phrases.name, ()) == tokenizer.spelt_words(name)
        if language == "chinese":
            assert {len(word) for phrase in (phrases.name, *phrases.keywords) for word in phrase} <= {1}
        else:
            assert len(phrases.name) == len(name.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": ("english", "smell")}, r"modalities must be .* got \('english', 'smell'\)"),
        ({"modalities": ()}, "at least one"),
        ({"modalities": ("english", "english")}, "different"),
        ({"modalities": "english"}, "string 'english'"),
        ({"batch_size": 10, "process_count": 4}, "multiple of process_count 4, got 10"),
        ({"batch_size": 0}, "got 0"),
        ({"batch_size": 200}, "161 pictographs of the split, got 200"),
        ({"process_index": 2, "process_count": 2}, "got 2 of 2"),
        ({"seed": -1}, "seed .* got -1"),
    ],
)
def test_bad_arguments(small, options, message):
    arguments = {"modalities": DEFAULT, "batch_size": 32, "seed": 0, "train": True} | options
    with pytest.raises(ValueError, match=message):
        pipeline.make_loader(small, **arguments)

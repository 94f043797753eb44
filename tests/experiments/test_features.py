"""The baseline's features against direct, slow definitions and cases with known answers."""

import math

import numpy as np
import pytest

from experiments import features


def slow_hog(picture, cell):
    """Dalal and Triggs pixel by pixel, in plain Python."""
    height, width, channels = picture.shape
    rows, columns = height // cell, width // cell
    cells = np.zeros((rows, columns, 9))
    for y in range(height):
        for x in range(width):
            best = (-1.0, 0.0, 0.0)
            for c in range(channels):
                dx = picture[y, min(x + 1, width - 1), c] - picture[y, max(x - 1, 0), c]
                dy = picture[min(y + 1, height - 1), x, c] - picture[max(y - 1, 0), x, c]
                if math.hypot(dx, dy) > best[0]:
                    best = (math.hypot(dx, dy), dx, dy)
            magnitude, dx, dy = best
            degrees = math.degrees(math.atan2(dy, dx)) % 180
            for b in range(9):
                distance = abs(degrees - (20 * b + 10))
                distance = min(distance, 180 - distance)
                cells[y // cell, x // cell, b] += magnitude * max(0.0, 1 - distance / 20)
    blocks = []
    for y in range(rows - 1):
        for x in range(columns - 1):
            block = np.concatenate([cells[y, x], cells[y, x + 1], cells[y + 1, x], cells[y + 1, x + 1]])
            block = np.minimum(block / max(np.linalg.norm(block), 1e-6), 0.2)
            blocks.append(block / max(np.linalg.norm(block), 1e-6))
    return np.concatenate(blocks)


@pytest.mark.parametrize("cell", [2, 4])
def test_hog_equals_the_pixel_by_pixel_definition(cell):
    pictures = np.random.default_rng(0).uniform(size=(3, 8, 12, 3))
    expected = np.stack([slow_hog(picture, cell) for picture in pictures])
    np.testing.assert_allclose(features.hog(pictures, cell=cell), expected, atol=1e-9)


def test_hog_votes_for_the_orientation_of_a_ramp():
    angle = math.radians(50)  # the centre of the third bin
    y, x = np.mgrid[:16, :16]
    ramp = (x * math.cos(angle) + y * math.sin(angle)) / 32
    histogram = features.hog(np.repeat(ramp[None, :, :, None], 3, axis=-1), cell=4).reshape(-1, 9).sum(axis=0)
    assert histogram.argmax() == 2
    # Away from the border, where the gradient is one-sided, nothing else gets a vote.
    inner = features.hog(np.repeat(ramp[None, :, :, None], 3, axis=-1), cell=4).reshape(3, 3, 4, 9)[1, 1]
    np.testing.assert_allclose(np.delete(inner, 2, axis=-1), 0, atol=1e-6)


def test_hog_of_a_flat_picture_is_zero():
    assert not features.hog(np.full((1, 8, 8, 3), 0.7), cell=4).any()


def test_hog_refuses_cells_that_do_not_fit():
    with pytest.raises(ValueError, match="cell=5"):
        features.hog(np.zeros((1, 8, 8, 3)), cell=5)
    with pytest.raises(ValueError, match="twice"):
        features.hog(np.zeros((1, 8, 8, 3)), cell=8)


def test_colour_of_a_two_colour_picture():
    picture = np.zeros((1, 4, 4, 3))
    picture[0, :, :2] = [1.0, 0.0, 0.0]
    picture[0, :, 2:] = [0.0, 0.0, 1.0]
    means, histogram = np.split(features.colour(picture, grid=2)[0], [12])
    np.testing.assert_allclose(means, np.array([1, 0, 0, 0, 0, 1] * 2) / 2)
    np.testing.assert_allclose(histogram[[3 * 16, 3]], math.sqrt(0.5))
    assert np.count_nonzero(histogram) == 2


def test_picture_features_balance_shape_and_colour():
    pictures = np.random.default_rng(1).uniform(size=(2, 8, 8, 3))
    both = features.picture_features(pictures, cells=(2, 4), grid=2, colour_weight=0.5)
    fine, coarse, paint = np.split(both, [9 * 36, 10 * 36], axis=1)
    np.testing.assert_allclose(np.linalg.norm(fine, axis=1), np.sqrt(0.5))
    np.testing.assert_allclose(np.linalg.norm(coarse, axis=1), np.sqrt(0.5))
    np.testing.assert_allclose(np.linalg.norm(paint, axis=1), 0.5)


def test_tfidf_by_hand():
    texts = ["ab", "ab ab", "ac"]
    tfidf = features.TfIdf.fit(texts, shortest=2, longest=2)
    # " a" is in all three, "ab" and "b " in two, "ac" and "c " in one: too rare.
    assert tfidf.vocabulary == {" a": 0, "ab": 1, "b ": 2}
    common, rare = 1 + math.log(4 / 4), 1 + math.log(4 / 3)
    twice = 1 + math.log(2)
    expected = np.array([[common, rare, rare], [twice * common, twice * rare, twice * rare], [common, 0, 0]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(tfidf(texts), expected, rtol=1e-6)


def test_tfidf_of_a_text_without_a_known_ngram_is_zero():
    tfidf = features.TfIdf.fit(["猫 cat", "猫 cat"], shortest=2, longest=3)
    assert not tfidf(["xyz", ""]).any()
    assert tfidf(["猫"]).any()


def test_pooled_log_mel_by_hand():
    fbank = np.arange(12, dtype=np.float64).reshape(6, 2)
    whole = [5, 6, *[math.sqrt(35 / 3)] * 2]
    halves = [2, 3, *[math.sqrt(8 / 3)] * 2, 8, 9, *[math.sqrt(8 / 3)] * 2]
    np.testing.assert_allclose(features.pooled_log_mel(fbank, segments=(1, 2)), whole + halves)


def test_pooled_log_mel_of_fewer_frames_than_segments():
    assert features.pooled_log_mel(np.ones((3, 4)), segments=(8,)).shape == (8 * 2 * 4,)


def test_silence_is_all_alike():
    silence, digital = np.full((10, 4), -3.0), np.full((10, 4), -15.9)
    assert not features.pooled_log_mel(silence, segments=(1, 4)).any()
    assert not features.pooled_log_mel(digital, segments=(1, 4)).any()

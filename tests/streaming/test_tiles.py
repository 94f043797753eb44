"""How many items are cut into tiles."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gramjax.streaming import _tiles, rowwise


@given(items=st.integers(1, 20000), most=st.sampled_from([256, 512, 4096]))
def test_tiles_share_the_items_evenly(items, most):
    size = _tiles.even(items, most)
    number = -(-items // size)
    assert size <= min(items, most)
    assert number == -(-items // most)
    assert number * size - items < 32 * number


@pytest.mark.parametrize(("platform", "most"), [("cpu", 4096), ("gpu", 16384)])
def test_searches_and_draws_share_them_so_too(platform, most, monkeypatch):
    """One item more than fills a tile must not double the work."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert rowwise._tile_shape(10, most, None)[1] == most
    assert rowwise._tile_shape(10, most + 1, None)[1] == most // 2 + 32
    assert rowwise._tile_shape(10, 4097, 4096)[1] == 4096
    assert rowwise._tile_shape(10, 5, None)[1] == 5

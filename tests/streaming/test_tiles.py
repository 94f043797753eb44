"""How many items are cut into tiles."""

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


def test_searches_and_draws_share_them_so_too():
    """One item more than fills a tile must not double the work."""
    for most in (4096, 16384):  # on CPU and elsewhere
        _, columns = rowwise._tile_shape(10, most + 1, None)
        assert columns < 0.6 * most
    assert rowwise._tile_shape(10, 4097, 4096)[1] == 4096
    assert rowwise._tile_shape(10, 5, None)[1] == 5

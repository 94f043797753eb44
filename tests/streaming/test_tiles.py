"""How many items are cut into tiles."""

from hypothesis import given
from hypothesis import strategies as st

from gramjax.streaming import _tiles


@given(items=st.integers(1, 20000), most=st.sampled_from([5, 256, 512]))
def test_tiles_share_the_items_evenly(items, most):
    size = _tiles.even(items, most)
    number = -(-items // size)
    assert size <= min(items, most)
    assert number == -(-items // most)
    assert number * size - items < 32 * number

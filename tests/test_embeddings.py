import jax.numpy as jnp
import numpy as np
import pytest

import gramjax


def test_stacks_in_order_and_marks_what_is_absent():
    text, audio = jnp.full((2, 3), 1.0), jnp.full((2, 3), 2.0)
    z, where = gramjax.stack_modalities(
        {"text": text, "audio": audio}, order=["audio", "video", "text"], where={"audio": jnp.array([True, False])}
    )
    np.testing.assert_array_equal(z[:, :, 0], [[2, 0, 1], [2, 0, 1]])
    np.testing.assert_array_equal(where, [[True, False, True], [False, False, True]])


def test_default_order_is_the_dictionarys():
    z, where = gramjax.stack_modalities({"b": jnp.zeros((2, 3), jnp.bfloat16), "a": jnp.ones((2, 3), jnp.bfloat16)})
    np.testing.assert_array_equal(z[:, :, 0], [[0, 1], [0, 1]])
    assert z.dtype == jnp.bfloat16
    assert np.all(where)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (({},), ValueError, "at least one modality, got none"),
        (([np.ones((2, 3))],), TypeError, "embeddings must be a mapping of modality names to arrays, got list"),
        (({"a": np.ones((2, 3))}, None, np.ones((2, 1), bool)), TypeError, "where must be a mapping .*, got ndarray"),
        (({"a": np.ones((2, 3))}, ["b"]), ValueError, r"at least one modality of \['b'\], got \['a'\]"),
        (({"a": np.ones((2, 3))}, ["a", "a"]), ValueError, r"must not repeat a name, got \['a', 'a'\]"),
        (({"a": np.ones((2, 3)), "b": np.ones((2, 4))},), ValueError, r"'a' is \(2, 3\) .*'b' is \(2, 4\)"),
        (
            ({"a": np.ones((2, 3), np.int32)},),
            TypeError,
            r"embeddings\['a'\] must have a floating-point dtype, got int32",
        ),
        (({"a": np.ones((2, 3, 1))},), ValueError, r"one shape \[batch, dim\]"),
        (({"a": np.ones((2, 3))}, None, {"b": np.ones(2, bool)}), ValueError, r"where has masks for \['b'\]"),
        (({"a": np.ones((2, 3))}, None, {"a": np.ones(3, bool)}), ValueError, r"where\['a'\] must have shape .*\(2,\)"),
    ],
)
def test_bad_input(arguments, error, said, unchecked_signatures):
    embeddings, order, where = (*arguments, None, None)[:3]
    with pytest.raises(error, match=said):
        gramjax.stack_modalities(embeddings, order=order, where=where)

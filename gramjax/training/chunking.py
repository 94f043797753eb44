"""Gradient caching: a batch embedded a few rows at a time, for a loss over all of its rows."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gramjax import _checks, _devices


def chunked_embed(
    embed: Callable[..., Any], params: Any, batch: Any, *, chunk_size: int, key: jax.Array | None = None
) -> Any:
    """Embeds a batch in chunks, keeping the activations of one chunk at a time: gradient caching.

    A contrastive loss needs all embeddings at once, but not all activations. The forward pass goes over the chunks and
    keeps their embeddings; the backward pass goes over them again, with the gradient the loss has given each embedding,
    and recomputes a chunk's activations just before their use (GradCache, arXiv 2101.06983, section 3). The gradient
    is the exact one of the loss over the whole batch, for one more forward pass. It is added up over the chunks in at
    least float32, whatever the dtype of `params`.

    On CPUs, XLA compiles the gradients of convolutions to slow code inside loops, and so in chunks
    (https://github.com/jax-ml/jax/issues/12868): an encoder with convolutions takes several times longer there.

    Chunk i of n holds the rows i, i + n, i + 2n, ...: of a batch divided over devices, every chunk has rows of every
    device.

    - Global arrays under `jax.jit`, on a mesh with Auto or Explicit axes: call it as on one device. No row moves if
      the devices divide the chunks' rows and the chunks the batch; otherwise an Auto mesh moves rows, and an Explicit
      one raises. The gradient of `params` is summed over the devices once a chunk, unless the compiler moves that.
    - Inside `jax.shard_map`: chunks are of the device's own rows, and the gradient of `params` is summed over the
      devices once in all. Fold `jax.lax.axis_index` into `key`, or all devices draw the same masks.

    Args:
      embed: `embed(params, chunk)`, or `embed(params, chunk, key)` if a key is given; returns a tree of arrays whose
        first axis is the chunk's. It must treat rows alone: statistics over the batch would be those of a chunk.
      params: tree of arrays, such as the parameters of an encoder, or an NNX module. What `embed` changes in a module,
        such as running statistics, is lost. Arrays that `embed` closes over have gradients too.
      batch: tree of arrays that share their first axis (pixels, token ids, masks); None stands for no array.
      chunk_size: most rows in a chunk, at least 1. Chunks are as even as can be; if they do not divide the batch, some
        repeat the last row, and the result of that is dropped.
      key: of dropout. Every chunk has a key of its own, split from this one, the same in both passes. Without dropout
        the result depends on `chunk_size` by rounding alone; with it, the masks drawn depend on it.

    Returns:
      What `embed(params, batch)` does, rows in the order of `batch`, names in dictionaries in the order `embed` gives
      them: `stack_modalities` takes the first for the anchor unless told otherwise.

    Raises:
      TypeError: if `chunk_size` is not an integer.
      ValueError: if `chunk_size` is less than 1, `batch` has no arrays, no rows, or arrays of different numbers of
        rows, `embed` returns something else than one row for each, or an Explicit mesh cannot divide the chunks.

    >>> def embed(params, chunk, key):
    ...     kept = jax.random.bernoulli(key, 0.9, chunk["x"].shape)
    ...     return jnp.tanh(jnp.where(kept, chunk["x"], 0.0) @ params)
    >>> def loss(params, batch, key):
    ...     z = chunked_embed(embed, params, batch, chunk_size=2, key=key)
    ...     return jnp.mean(jax.nn.logsumexp(z @ z.T, axis=1))
    >>> batch = {"x": jnp.ones((8, 3))}
    >>> jax.grad(loss)(jnp.ones((3, 4)), batch, jax.random.key(0)).shape
    (3, 4)

    An NNX model, in a `loss_fn` of `make_train_step`:

        z = chunked_embed(
            lambda model, chunk, key: model.embed(chunk, rngs=nnx.Rngs(key)),
            model, batch, chunk_size=32, key=rngs.dropout(),
        )
    """
    rows = _rows(batch)
    chunks = -(-rows // _checks.size("chunk_size", chunk_size, or_none=False))
    size = -(-rows // chunks)
    key = None if key is None else _checks.random_key("key", key)
    leaves, tree = jax.tree.flatten(params)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    dtypes = [leaf.dtype for leaf in leaves]
    # What varies over devices only inside the loop would be summed over them there, once a chunk.
    leaves = _devices.vary_over([_widened(leaf) for leaf in leaves], _devices.varying((batch, key)))

    # All that the backward pass is left with is what goes in here, and that is the same for all chunks.
    def embed_chunk(leaves: list[Array], split: Any, i: Array, key: Array | None) -> Any:
        params = tree.unflatten([x if x.dtype == dtype else x.astype(dtype) for x, dtype in zip(leaves, dtypes)])
        # A slice of the second axis, not `xs` of the scan: that would hold a transposed copy of the batch.
        chunk = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False), split)
        embedded = embed(params, chunk) if key is None else embed(params, chunk, key)
        for x in jax.tree.leaves(embedded):
            if jnp.shape(x)[:1] != (size,):
                raise ValueError(
                    f"embed must return arrays with a first axis of {size}, its chunk's, got {jnp.shape(x)}."
                )
        return _with_dicts_of(OrderedDict, embedded)

    # A loop keeps the compiler from merging the two computations of a chunk; without one it could.
    embed_chunk = jax.checkpoint(embed_chunk, prevent_cse=False)
    split = jax.tree.map(lambda x: _split(jnp.asarray(x), size, chunks), batch)
    keys = None if key is None else jax.random.split(key, chunks)
    _, embedded = jax.lax.scan(
        lambda _, step: (None, embed_chunk(leaves, split, *step)), None, (jnp.arange(chunks), keys)
    )
    embedded = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:rows], embedded)
    return _with_dicts_of(dict, embedded)


def _rows(batch: Any) -> int:
    shapes = {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    if not shapes:
        raise ValueError("batch must hold at least one array, got none.")
    (first, shape), *others = shapes.items()
    for name, other in shapes.items():
        if not other or other[0] == 0:
            raise ValueError(f"batch{name} must have shape [rows, ...] with at least one row, got shape {other}.")
    for name, other in others:
        if other[0] != shape[0]:
            raise ValueError(
                f"batch must have arrays of one number of rows: batch{first} has shape {shape}, batch{name} {other}."
            )
    return shape[0]


def _with_dicts_of(kind: type[dict], tree: Any) -> Any:
    """The tree with its dictionaries made into `kind`. JAX sorts the names in a dict, but not in an OrderedDict."""

    def convert(x: Any) -> Any:
        return kind((name, _with_dicts_of(kind, value)) for name, value in x.items()) if isinstance(x, dict) else x

    return jax.tree.map(convert, tree, is_leaf=lambda x: isinstance(x, dict))


def _widened(x: Array) -> Array:
    half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if half else x


def _split(x: Array, size: int, chunks: int) -> Array:
    """`[rows, ...]` as `[size, chunks, ...]`: the axis that devices divide stays first."""
    padding = size * chunks - x.shape[0]
    # The type of an array tells how an Explicit mesh divides it; on an Auto mesh it has no names.
    sharding = jax.typeof(x).sharding
    names = sharding.spec[0] or () if sharding.spec else ()
    devices = math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
    if devices > 1 and (padding or size % devices):
        raise ValueError(
            f"chunk_size must divide the {x.shape[0]} rows of batch and be a multiple of the {devices} devices that an "
            f"Explicit mesh divides them over, got chunks of {size} rows."
        )
    if padding:
        # Zeros could have infinite derivatives, and 0 * inf is nan: what is certain to be a row is a row.
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (padding, *x.shape[1:]))])
    return x.reshape(size, chunks, *x.shape[1:])

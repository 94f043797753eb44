"""Hard negatives for a matching loss, drawn without holding the matrix of all scores.

Two passes over the tiles: the mass of each row, then the entry at which the cumulative mass crosses the row's random
number. That takes a few random numbers a row, where Gumbel noise would take one for each pair.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from gramjax import _checks, _devices
from gramjax._score import Score, check_inputs
from gramjax.streaming import _tiles, rowwise

_GROUP = 64


def sample_hard_negatives(
    key: Array,
    score: Score,
    queries: Float[Array, "batch dim"],
    gallery: Float[Array, "batch modality dim"],
    *,
    draw: Literal["items", "queries"] = "items",
    temperature: ArrayLike = 0.07,
    uniform_share: ArrayLike = 0.1,
    floor: ArrayLike | None = None,
    query_where: Bool[Array, " batch"] | None = None,
    gallery_where: Bool[Array, "batch modality"] | None = None,
    ids: Int[Array, " batch"] | None = None,
    block_size: int | None = None,
    axis_name: _devices.AxisName | None = None,
    mesh: Mesh | None = None,
) -> Int[Array, " batch"]:
    """One hard negative for each example, drawn from `softmax(score / temperature)` over the others.

    The matching loss of GRAM takes one call for each direction, with different keys: `draw="items"` gives each query
    (text) an item that is not its own (hard negative data), `draw="queries"` gives each item a query that is not its
    own (hard negative text).

    With probability `uniform_share` an example's negative is uniform over the others instead, which keeps draws
    varied where the softmax has all its mass on a few near-duplicates (false negatives, often) or a model that has
    collapsed. The share is a total: a tenth, the default, leaves nine negatives in ten hard whatever the batch size.
    The published code adds `floor=1e-4` to every probability, which at 65,536 negatives makes 87 draws in 100 uniform.

    The same key gives the same negatives whatever the tiles and the number of devices: each row's random numbers come
    from the key and its index in the whole batch. Only rounding can shift the crossing of a cumulative sum to the next
    entry, which happens for about one row in a million in float32.

    Args:
      key: from `jax.random.key`; the same on all devices.
      score: what is compared. Better scores are likelier, in the score's own direction.
      queries: `[batch, d]`.
      gallery: `[batch, m, d]`; item `i` matches query `i` and is never its negative.
      draw: "items", a negative item for each query, or "queries", a negative query for each item.
      temperature: positive scalar, in units of the score. May be traced.
      uniform_share: probability of a uniform draw, in [0, 1]. May be traced.
      floor: the published rule instead of `uniform_share`: this is added to each probability of the softmax over all
        candidates, the positive included, and then the positive is left out. At least 0. May be traced.
      query_where: `[batch]` bool, which queries are present; default all.
      gallery_where: `[batch, m]` bool, which modalities of the items are present; default all.
      ids: `[batch]` integers; examples with equal ids are never each other's negatives; default all different.
      block_size: columns of a tile; default from the platform.
      axis_name: inside `jax.shard_map`, the mesh axis over which the batch is divided: the arguments are then this
        device's examples. The candidates travel round a ring.
      mesh: a mesh, to call this outside `shard_map` on global arrays; `axis_name` may be left out if it has one axis.

    Returns:
      `[batch]` int32, indices into the whole batch. -1 for an example that is not there (its query is not present, or
      the score cannot use its item) and for one without a negative. No gradient flows.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> from gramjax.scores import Cosine
    >>> a = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> negatives = sample_hard_negatives(jax.random.key(0), Cosine(), a, a[:, None], uniform_share=0.0)
    >>> negatives[:2]  # the third is orthogonal
    Array([1, 0], dtype=int32)
    """
    queries, gallery, where = check_inputs(score, ("tile",), queries, gallery, gallery_where)
    batch = queries.shape[0]
    if gallery.shape[0] != batch:
        raise ValueError(
            "queries and gallery must hold matched pairs, item i for query i; "
            f"got shapes {queries.shape} and {gallery.shape}."
        )
    query_where = _checks.mask("query_where", query_where, (batch,), "[batch]")
    temperature = _checks.positive("temperature", temperature, queries.dtype)
    key = _threefry(_checks.random_key("key", key))
    if draw not in ("items", "queries"):
        raise ValueError(f'draw must be "items" or "queries", got {draw!r}.')
    even = _checks.between("uniform_share", uniform_share, 0.0, 1.0, queries.dtype)
    if floor is not None:
        even = _checks.between("floor", floor, 0.0, None, queries.dtype)
    if ids is not None:
        ids = _checks.ids("ids", ids, batch)
    block_size, axis_name, devices = rowwise.check_place(block_size, axis_name, mesh)
    if mesh is not None and batch % devices:
        raise ValueError(
            f"queries must have a first axis that divides over the {devices} devices of mesh axis {axis_name!r}, got "
            f"shape {queries.shape}."
        )
    plan = _Plan(score, draw, floor is not None, block_size, axis_name, mesh)
    examples = jnp.where(query_where[:, None], queries, 0.0), gallery, query_where, where, ids
    return _sample(plan, key, (temperature, even), jax.lax.stop_gradient(examples))


class _Plan(NamedTuple):
    score: Score
    draw: str
    adds_floor: bool
    block_size: int | None
    axis_name: _devices.AxisName | None
    mesh: Mesh | None


class _Side(NamedTuple):
    """Rows or columns: `[n, d]` or prepared items, who is there, who matches whom, and indices in the whole batch."""

    content: Any
    present: Bool[Array, " n"]
    ids: Int[Array, " n"]
    index: Int[Array, " n"]


class _Mass(NamedTuple):
    """`exp(peak) * mass` is the sum of the exponentials of the logits; `[n]` each."""

    peak: Array
    mass: Array


class _Draw(NamedTuple):
    """Where a row's cumulative sum of `exp(logit - peak)`, or of ones, shall stop, counted from the shard's start."""

    shard: Int[Array, " n"]
    target: Array
    uniform: Bool[Array, " n"]
    peak: Array


@functools.partial(jax.jit, static_argnames="plan")
def _sample(plan: _Plan, key, scalars, examples):
    if plan.mesh is None:
        return _sample_here(plan, key, scalars, examples)
    specs = PartitionSpec(), PartitionSpec(), PartitionSpec(plan.axis_name)
    body = functools.partial(_sample_here, plan)
    return _devices.run_on(plan.mesh, body, (key, scalars, examples), specs, specs[-1])


def _sample_here(plan, key, scalars, examples):
    temperature, even = scalars
    queries, gallery, query_where, where, ids = examples
    batch = queries.shape[0]
    index = batch * _devices.position(plan.axis_name) + jnp.arange(batch, dtype=jnp.int32)
    ids = index if ids is None else ids
    usable = plan.score.usable(where)
    of_queries, of_items = _Side(queries, query_where, ids, index), _Side((gallery, where), usable, ids, index)

    def prepare(side):
        return side._replace(content=plan.score.prepare(*side.content))

    rows, columns, load = (
        (of_queries, of_items, prepare) if plan.draw == "items" else (prepare(of_items), of_queries, lambda side: side)
    )
    fold = functools.partial(rowwise.fold, load=load, block_size=plan.block_size)
    examine, across = functools.partial(_examine, plan, temperature), _candidates(plan)

    # The number of the shard travels along: the ring need not follow the order of the devices.
    place, devices = jnp.int32(_devices.position(plan.axis_name)), _devices.axis_size(plan.axis_name)
    nothing = _no_mass(batch, queries.dtype)

    def weigh(masses, columns, shard):
        here = fold(functools.partial(_add_masses, examine, across), nothing, rows, columns)
        return _tiles.put(masses, jax.tree.map(lambda x: x[None], here), shard), shard

    empty = jax.tree.map(lambda x: jnp.stack([x] * devices), nothing)
    (masses, count), _ = _devices.round_the_ring(plan.axis_name, weigh, empty, columns, place)
    draws = _place_targets(plan, key, even, index, masses, count)

    def find(chosen, columns, shard):
        nothing = jnp.zeros(batch, queries.dtype), jnp.full(batch, -1, jnp.int32), jnp.full(batch, -1, jnp.int32)
        _, found, last = fold(functools.partial(_cross, examine, across), nothing, (rows, draws), columns)
        return jnp.where(draws.shard == shard, jnp.where(found >= 0, found, last), chosen), shard

    found, _ = _devices.round_the_ring(plan.axis_name, find, jnp.full(batch, -1, jnp.int32), columns, place)
    paired = query_where & usable
    return jnp.where(paired & (jnp.sum(count, axis=0) > 0), found, -1)


def _examine(plan, temperature, rows, tile) -> tuple[Array, Array, Array]:
    """Logits of a tile, which of them are candidates at all, and which are negatives: `[queries, items]` each.

    So the candidates lie along axis 1 or 0 as `_candidates` tells: XLA reads a transposed tile many times slower.
    """
    columns, across = tile.content, _candidates(plan)
    queries, items = (rows, columns) if plan.draw == "items" else (columns, rows)
    scores = plan.score.tile(queries.content, items.content)
    logits = (scores if plan.score.higher_is_better else -scores) / temperature
    candidates = jnp.expand_dims(columns.present & tile.fresh, 1 - across) & ~jnp.isnan(logits)
    different = (queries.ids[:, None] != items.ids[None, :]) & (queries.index[:, None] != items.index[None, :])
    return logits, candidates, candidates & different


def _candidates(plan) -> int:
    return 1 if plan.draw == "items" else 0


def _no_mass(rows: int, dtype) -> tuple[tuple[_Mass, _Mass], Array]:
    nothing = _Mass(jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype))
    return (nothing, nothing), jnp.zeros(rows, jnp.int32)


def _add_masses(examine, across, state, rows, tile):
    """Masses of the negatives and of all candidates, and the number of the negatives."""
    masses, count = state
    logits, candidates, negatives = examine(rows, tile)

    def add(running, counted):
        counted_logits = jnp.where(counted, logits, -jnp.inf)
        peak = jnp.maximum(running.peak, jnp.max(counted_logits, axis=across))
        finite = jnp.where(peak > -jnp.inf, peak, 0.0)
        here = jnp.sum(jnp.exp(counted_logits - jnp.expand_dims(finite, across)), axis=across)
        return _Mass(peak, running.mass * jnp.exp(running.peak - finite) + here)

    count = count + jnp.sum(negatives, axis=across, dtype=jnp.int32)
    return (add(masses[0], negatives), add(masses[1], candidates)), count


def _threefry(key: Array) -> Array:
    """The key in JAX's default generator: of others, a row's bits depend on how many rows are drawn at once."""
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    key = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
    return functools.reduce(jax.random.fold_in, words[2:], key)


def _place_targets(plan, key, even, index, masses, counts) -> _Draw:
    """Draws each row's random numbers and finds the shard of the columns in which they fall."""
    negatives, candidates = masses
    peak, mass = _total(negatives)
    count = jnp.sum(counts, axis=0)
    if plan.adds_floor:
        top, everything = _total(candidates)
        hard = mass * jnp.exp(peak - top) / jnp.where(everything > 0, everything, 1.0)
        added = even * count.astype(mass.dtype)
        share = added / jnp.where(hard + added > 0, hard + added, 1.0)
    else:
        share = even
    bits = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row), (3,), jnp.uint32))(index)
    # As many bits as a float32 holds exactly; a remainder of 32 bits is even to 1 part in 4,000 for a million columns.
    choice, height = ((bits[:, i] >> 8).astype(mass.dtype) * 2.0**-24 for i in range(2))
    ordinal = (bits[:, 2] % jnp.maximum(count, 1).astype(jnp.uint32)).astype(mass.dtype)
    uniform = choice < share
    in_shards = negatives.mass * jnp.exp(negatives.peak - peak[None, :])
    in_shards = jnp.where(uniform[None, :], counts.astype(mass.dtype), in_shards)
    target = jnp.where(uniform, ordinal + 0.5, height * mass)
    ends = jnp.cumsum(in_shards, axis=0)
    last = in_shards.shape[0] - 1 - jnp.argmax((in_shards > 0)[::-1], axis=0)
    shard = jnp.minimum(jnp.sum(ends <= target[None, :], axis=0), last).astype(jnp.int32)
    before = jnp.take_along_axis(ends - in_shards, shard[None, :], axis=0)[0]
    return _Draw(shard, target - before, uniform, peak)


def _total(masses: _Mass) -> tuple[Array, Array]:
    """Peak and mass of all shards together; the peak is 0 where there is nothing."""
    peak = jnp.max(masses.peak, axis=0)
    peak = jnp.where(peak > -jnp.inf, peak, 0.0)
    return peak, jnp.sum(masses.mass * jnp.exp(masses.peak - peak[None, :]), axis=0)


def _cross(examine, across, state, rows, tile):
    """Adds up a tile's weights and notes where the sum first exceeds the target, and the last weight there is."""
    reached, found, last = state
    rows, draws = rows
    logits, _, negatives = examine(rows, tile)
    uniform, peak = (jnp.expand_dims(x, across) for x in (draws.uniform, draws.peak))
    weights = jnp.where(uniform, 1.0, jnp.exp(logits - peak))
    weights = jnp.where(negatives, weights, 0.0)
    # In two levels: sums of groups of columns, then the members of the one group in which the sum crosses.
    padding = [(0, -size % _GROUP if axis == across else 0) for axis, size in enumerate(weights.shape)]
    shape = (reached.shape[0], -1, _GROUP) if across else (-1, _GROUP, reached.shape[0])
    groups = jnp.pad(weights, padding).reshape(shape)
    sums = jnp.sum(groups, axis=across + 1)
    ends = reached[:, None] + jnp.cumsum(sums if across else sums.T, axis=1)
    group = jnp.sum(ends <= draws.target[:, None], axis=1)
    crossed = (group < ends.shape[1]) & (found < 0)
    group = jnp.minimum(group, ends.shape[1] - 1)[:, None]
    members = jnp.take_along_axis(groups, group[:, :, None] if across else group.T[:, None], axis=across)
    members = members[:, 0] if across else members[0].T
    start = jnp.where(group > 0, jnp.take_along_axis(ends, jnp.maximum(group - 1, 0), axis=1), reached[:, None])
    before = jnp.sum(start + jnp.cumsum(members, axis=1) <= draws.target[:, None], axis=1)
    final = _GROUP - 1 - jnp.argmax((members > 0)[:, ::-1], axis=1)
    column = group[:, 0] * _GROUP + jnp.minimum(before, final)
    index = tile.content.index
    found = jnp.where(crossed, index[jnp.minimum(column, index.shape[0] - 1)], found)
    last = jnp.maximum(last, jnp.max(jnp.where(weights > 0, jnp.expand_dims(index, 1 - across), -1), axis=across))
    return ends[:, -1], found, last

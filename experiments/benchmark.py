"""Times the losses against the forms they replace, side by side in one run: `python -m experiments.benchmark`.

Machines differ and are shared, so what counts is the ratio of two times measured alternately. The published form of the
GRAM loss builds a `[B, B, k, k]` tensor of Gram matrices and takes their determinants; the plain form of the PMRL
spectrum is `jnp.linalg.svd`. Prints a markdown table and writes it as JSON.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from gramjax import linalg, losses


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed."""

    dim: int = 512
    batch_sizes: tuple[int, ...] = (256, 1024)
    modalities: tuple[int, ...] = (3, 5)
    spectra: int = 16384
    """Number of sets of vectors whose singular values and leading directions are computed."""
    repeats: int = 5
    """Alternating measurements of each pair; the fastest counts."""
    output: Path = Path("runs/benchmark.json")


def published_gram_loss(z: jax.Array, temperature: float = 0.07) -> jax.Array:
    """The volume loss through a determinant for every pair, as the published code computes it."""
    n, k, _ = z.shape
    exact = jax.lax.Precision.HIGHEST
    cross = jnp.einsum("id,jld->ijl", z[:, 0], z[:, 1:], precision=exact)
    inner = jnp.broadcast_to(jnp.einsum("jld,jmd->jlm", z[:, 1:], z[:, 1:], precision=exact), (n, n, k - 1, k - 1))
    corner = jnp.broadcast_to(jnp.sum(jnp.square(z[:, 0]), axis=-1)[:, None, None, None], (n, n, 1, 1))
    top = jnp.concatenate([corner, cross[:, :, None, :]], axis=3)
    gram = jnp.concatenate([top, jnp.concatenate([cross[..., None], inner], axis=3)], axis=2)
    logits = -jnp.sqrt(jnp.abs(jnp.linalg.det(gram))) / temperature
    rows, columns = jax.nn.log_softmax(logits, axis=1), jax.nn.log_softmax(logits, axis=0)
    return -0.5 * jnp.mean(jnp.diagonal(rows) + jnp.diagonal(columns))


def plain_spectrum(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Singular values and leading direction by XLA's singular value decomposition."""
    left, values, _ = jnp.linalg.svd(jnp.swapaxes(z, 1, 2), full_matrices=False)
    return values, left[..., 0]


def spectral_loss(spectrum: Callable) -> Callable:
    """A softmax over the singular values and a function of the leading direction, as PMRL has them."""

    def loss(z):
        values, direction = spectrum(z)
        return jnp.mean(jax.nn.logsumexp(values / 0.05, axis=-1)) + jnp.mean(jnp.square(direction[:, 0]))

    return loss


def compare(ours: Callable, theirs: Callable, z: jax.Array, repeats: int) -> tuple[float, float]:
    """Seconds of a value and gradient of each: the fastest of alternating runs, compilation left out."""
    steps = [jax.jit(jax.value_and_grad(f)) for f in (ours, theirs)]
    for step in steps:
        jax.block_until_ready(step(z))
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        for i, step in enumerate(steps):
            began = time.perf_counter()
            jax.block_until_ready(step(z))
            best[i] = min(best[i], time.perf_counter() - began)
    return best[0], best[1]


def unit_vectors(batch: int, k: int, dim: int) -> jax.Array:
    """Loosely related unit vectors, float32."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(batch, 1, dim)) + rng.normal(size=(batch, k, dim))
    return jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True), jnp.float32)


def main() -> None:
    """Time as the command line says."""
    options = tyro.cli(Options, description=__doc__)
    rows = []
    for k in options.modalities:
        for batch in options.batch_sizes:
            z = unit_vectors(batch, k, options.dim)
            times = compare(losses.gram_loss, published_gram_loss, z, options.repeats)
            rows.append(("gram_loss / [B, B, k, k] determinants", batch, k, *times))
        z = unit_vectors(options.spectra, k, options.dim)
        times = compare(spectral_loss(linalg.spectrum), spectral_loss(plain_spectrum), z, options.repeats)
        rows.append(("spectrum / jnp.linalg.svd", options.spectra, k, *times))
    print(f"value and gradient, d = {options.dim}, {jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| what | B | k | ours, ms | theirs, ms | times faster |\n| --- | --: | --: | --: | --: | --: |")
    for what, batch, k, ours, theirs in rows:
        print(f"| {what} | {batch} | {k} | {1e3 * ours:.1f} | {1e3 * theirs:.1f} | {theirs / ours:.1f} |")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    names = ("what", "batch", "modalities", "seconds", "seconds_of_the_form_replaced")
    options.output.write_text(json.dumps([dict(zip(names, row)) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

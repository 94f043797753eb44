"""Times exact search and spectra against what they replace: `python -m experiments.benchmark_search`.

Search: `gramjax.retrieval.search` beside the exact inner-product search of faiss (`pip install faiss-cpu`; left out
where it is not installed), on the same gallery and queries. By volume an item of `m` modalities takes `m` matrix
products where faiss takes one, so `m` times the time of faiss is par. Spectra: singular values and leading direction,
value and gradient, beside `jnp.linalg.svd`. Machines differ and are shared, so what counts is the ratio of two times
measured alternately in one run. On one core: `OPENBLAS_NUM_THREADS=1 taskset -c 0 python -m ...`.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.benchmark import plain_spectrum, spectral_loss
from gramjax import linalg, retrieval
from gramjax.scores import Cosine, Volume


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed."""

    items: int = 100_000
    dim: int = 512
    queries: tuple[int, ...] = (64, 128, 256)
    modalities: tuple[int, ...] = (1, 2, 3)
    k: int = 10
    spectra: tuple[tuple[int, int, int], ...] = ((65536, 3, 512), (65536, 3, 64), (16384, 5, 512), (16384, 8, 128))
    """Shapes of the sets of vectors: items, modalities, dimensions."""
    repeats: int = 5
    """Alternating measurements of each pair; the fastest counts."""
    output: Path = Path("runs/benchmark_search.json")


def alternate(ours: Callable, theirs: Callable, repeats: int) -> tuple[float, float]:
    """Seconds of each: the fastest of alternating runs, the first left out."""
    best = [float("inf"), float("inf")]
    for repeat in range(repeats + 1):
        for i, run in enumerate((ours, theirs)):
            began = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:
                best[i] = min(best[i], time.perf_counter() - began)
    return best[0], best[1]


def unit_vectors(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random unit vectors, float32."""
    z = rng.standard_normal(shape, dtype=np.float32)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def time_search(options: Options) -> list[dict]:
    """Volume and cosine by gramjax, inner products by faiss."""
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("faiss is not installed: no comparison of search\n")
        return []
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    rng = np.random.default_rng(0)
    gallery = unit_vectors(rng, options.items, max(options.modalities), options.dim)
    flat = faiss.IndexFlatIP(options.dim)
    flat.add(np.ascontiguousarray(gallery[:, 0]))
    rows = []
    for m in options.modalities:
        for score in (Cosine(), Volume()):
            index = retrieval.build_index(jnp.asarray(gallery[:, :m]), score=score)
            for number in options.queries:
                queries = unit_vectors(rng, number, options.dim)
                on_device = jnp.asarray(queries)
                found, expected = retrieval.search(index, on_device, options.k)[1], flat.search(queries, options.k)[1]
                if m == 1 and isinstance(score, Cosine) and np.mean(np.asarray(found) == expected) < 0.999:
                    raise AssertionError("the two searches disagree")
                times = alternate(
                    lambda: retrieval.search(index, on_device, options.k),  # noqa: B023 (called at once)
                    lambda: flat.search(queries, options.k),  # noqa: B023
                    options.repeats,
                )
                what = f"{type(score).__name__}, m = {m}, {number} queries"
                rows.append({"what": what, "seconds": times[0], "seconds_of_faiss": times[1]})
    return rows


def time_spectra(options: Options) -> list[dict]:
    """Value and gradient of a softmax over singular values and a function of the leading direction."""
    rows = []
    for shape in options.spectra:
        z = jnp.asarray(unit_vectors(np.random.default_rng(0), *shape))
        ours, theirs = (jax.jit(jax.value_and_grad(spectral_loss(f))) for f in (linalg.spectrum, plain_spectrum))
        times = alternate(lambda: ours(z), lambda: theirs(z), options.repeats)  # noqa: B023 (called at once)
        rows.append({"what": f"spectrum {list(shape)}", "seconds": times[0], "seconds_of_svd": times[1]})
    return rows


def main() -> None:
    """Time as the command line says."""
    options = tyro.cli(Options, description=__doc__)
    search, spectra = time_search(options), time_spectra(options)
    print(f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores, jax {jax.__version__}\n")
    if search:
        print(f"{options.items} items, d = {options.dim}, k = {options.k}\n")
        print("| search | gramjax, ms | faiss, ms | gramjax / faiss |\n| --- | --: | --: | --: |")
        for row in search:
            ours, theirs = row["seconds"], row["seconds_of_faiss"]
            print(f"| {row['what']} | {1e3 * ours:.1f} | {1e3 * theirs:.1f} | {ours / theirs:.2f} |")
    print("\n| value and gradient | gramjax, ms | jnp.linalg.svd, ms | times faster |\n| --- | --: | --: | --: |")
    for row in spectra:
        ours, theirs = row["seconds"], row["seconds_of_svd"]
        print(f"| {row['what']} | {1e3 * ours:.1f} | {1e3 * theirs:.1f} | {theirs / ours:.1f} |")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"search": search, "spectra": spectra}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

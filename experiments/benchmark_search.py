"""Times exact search beside faiss: `python -m experiments.benchmark_search`.

`gramjax.retrieval.search` beside the exact inner-product search of faiss, which must be installed (`pip install
faiss-cpu`), on the same gallery and queries. By volume an item of `m` modalities takes `m` matrix products where faiss
takes one, so `m` times the time of faiss is par. Machines differ and are shared, so what counts is the ratio of two
times measured alternately in one run. On one core: `OPENBLAS_NUM_THREADS=1 taskset -c 0 python -m ...`.
"""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.benchmark import compare, unit_vectors
from gramjax import retrieval
from gramjax.scores import Cosine, Volume


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed."""

    items: int = 100_000
    dim: int = 512
    queries: tuple[int, ...] = (64, 128, 256)
    modalities: tuple[int, ...] = (1, 2, 3)
    k: int = 10
    repeats: int = 5
    """Alternating measurements of each pair; the fastest counts."""
    output: Path = Path("runs/benchmark_search.json")


def time_search(options: Options, faiss: ModuleType) -> list[dict]:
    """Volume and cosine by gramjax, inner products by faiss."""
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    gallery = np.asarray(unit_vectors(options.items, max(options.modalities), options.dim))
    pool = np.random.default_rng(1).permutation(gallery[:, 0])
    flat = faiss.IndexFlatIP(options.dim)
    flat.add(np.ascontiguousarray(gallery[:, 0]))
    rows = []
    for m in options.modalities:
        for score in (Cosine(), Volume()):
            index = retrieval.build_index(jnp.asarray(gallery[:, :m]), score=score)
            for number in options.queries:
                queries = np.ascontiguousarray(pool[:number])
                on_device = jnp.asarray(queries)
                found, expected = retrieval.search(index, on_device, options.k)[1], flat.search(queries, options.k)[1]
                if m == 1 and isinstance(score, Cosine) and np.mean(np.asarray(found) == expected) < 0.999:
                    raise AssertionError("the two searches disagree")
                steps = {
                    "gramjax": functools.partial(retrieval.search, index, on_device, options.k),
                    "faiss": functools.partial(flat.search, queries, options.k),
                }
                times = compare(steps, options.repeats)
                what = f"{type(score).__name__}, m = {m}, {number} queries"
                rows.append({"what": what, "seconds": times["gramjax"], "seconds_of_faiss": times["faiss"]})
    return rows


def main() -> None:
    """Time as the command line says."""
    options = tyro.cli(Options, description=__doc__)
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError:
        sys.exit("error: faiss is not installed: pip install faiss-cpu")
    search = time_search(options, faiss)
    where = {"device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}
    where |= {"faiss": faiss.__version__}
    what = {"items": options.items, "dim": options.dim, "k": options.k}
    print(*(f"{name} {value}" for name, value in (where | what).items()), sep=", ", end="\n\n")
    print("| search | gramjax, ms | faiss, ms | gramjax / faiss |\n| --- | --: | --: | --: |")
    for row in search:
        ours, theirs = row["seconds"], row["seconds_of_faiss"]
        print(f"| {row['what']} | {1e3 * ours:.1f} | {1e3 * theirs:.1f} | {ours / theirs:.2f} |")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**where, **what, "rows": search}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Times the losses against the forms they replace, side by side in one run: `python -m experiments.benchmark`.

Machines differ and are shared, so what counts is the ratio of two times measured alternately. The loss of GRAM, value
and gradient, is compared with

- the published form, a `[B, B, k, k]` tensor of Gram matrices and their determinants, in JAX and, where it is
  installed, in PyTorch, with the volumes computed for each direction, as published, and for both at once;
- the matrix products of a loss that holds nothing between value and gradient, `4 (k - 1)` of `[B, d] x [d, B]`, at the
  rate of the best contiguous product of this run; three quarters of them where the loss keeps the first;
- the same scores as one `[B, B]` matrix, differentiated by JAX;

the plain form of the PMRL spectrum is `jnp.linalg.svd`; a copy of the vectors, which have a gradient of their own size,
is timed beside it. Memory is the peak of a process of its own; devices are
simulated on the processors of this machine, so that they show what the ring costs and not what it gains. Prints
markdown tables, writes all as JSON and draws it.

On GPUs and TPUs the same is measured there (but for the simulated devices); the floor also with products of TF32 and
of bfloat16, added up in float32, and memory, which is then the accelerator's, up to the largest batch that fits.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from experiments import figures
from experiments.cli import interrupts_end_at_once, one_line_errors
from gramjax import linalg, losses
from gramjax.scores import volume_scores
from gramjax.streaming.nll import softmax_nll

TEMPERATURE = 0.07
EXACT = jax.lax.Precision.HIGHEST
# Of the products of scores; those after the first are an accelerator's alone.
PRECISIONS = {
    "float32": EXACT,
    "TF32": jax.lax.DotAlgorithmPreset.TF32_TF32_F32,
    "bfloat16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
}
Step = Callable[[], Any]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    dim: int = 512
    batch_sizes: tuple[int, ...] = (1024, 2048)
    """Against the published form and the whole matrix, which are too large for much more."""
    large_batch_sizes: tuple[int, ...] = (2048, 8192)
    """Against the floor."""
    modalities: tuple[int, ...] = (3, 5)
    memory_batch_sizes: tuple[int, ...] = (4096, 16384, 65536)
    """With the most of `modalities`."""
    accelerator_batch_sizes: tuple[int, ...] = (262144, 524288, 1048576)
    """More of them, on GPUs and TPUs, until one does not fit."""
    sizes: tuple[int, ...] = (2, 3, 4, 6, 8)
    """Numbers of modalities over which the time is drawn."""
    dims: tuple[int, ...] = (128, 256, 512, 1024)
    devices: tuple[int, ...] = (1, 2, 4, 8)
    device_batch: int = 1024
    """Examples of one device, where the batch grows with the devices."""
    spectra: tuple[tuple[int, int, int], ...] = ((65536, 3, 512), (65536, 3, 64), (16384, 5, 512), (16384, 8, 128))
    """Shapes of the sets of vectors whose singular values and leading directions are computed: items, modalities,
    dimensions."""
    many_spectra: tuple[tuple[int, int, int], ...] = ((1000000, 2, 64), (1000000, 5, 64), (1000000, 8, 64))
    """The same for the most items, once."""
    repeats: int = 5
    """Alternating measurements of what is compared; the fastest counts."""
    output: Path = Path("runs/benchmark.json")
    """The picture goes beside it."""


def published_gram_loss(z: jax.Array) -> jax.Array:
    """The volume loss through a determinant for every pair, as the published code computes it."""
    n, k, _ = z.shape
    cross = jnp.einsum("id,jld->ijl", z[:, 0], z[:, 1:], precision=EXACT)
    inner = jnp.broadcast_to(jnp.einsum("jld,jmd->jlm", z[:, 1:], z[:, 1:], precision=EXACT), (n, n, k - 1, k - 1))
    corner = jnp.broadcast_to(jnp.sum(jnp.square(z[:, 0]), axis=-1)[:, None, None, None], (n, n, 1, 1))
    top = jnp.concatenate([corner, cross[:, :, None, :]], axis=3)
    gram = jnp.concatenate([top, jnp.concatenate([cross[..., None], inner], axis=3)], axis=2)
    logits = -jnp.sqrt(jnp.abs(jnp.linalg.det(gram))) / TEMPERATURE
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


def published_gram_loss_in_torch(z: np.ndarray, *, shared: bool) -> Step:
    """The same in PyTorch, with its gradient; the published code computes the volumes again for the other direction.

    Args:
      z: vectors, `[B, k, d]`, the anchor first.
      shared: compute them once for both. XLA, which sees both, always does.
    """
    import torch  # pyright: ignore[reportMissingImports]

    tensor = torch.tensor(z)
    target = torch.arange(len(z))

    def volumes(anchor, others):
        shape = len(anchor), len(anchor)
        own = torch.einsum("id,id->i", anchor, anchor)[:, None].expand(shape)
        cross = [anchor @ other.T for other in others]
        rows = [torch.stack([own, *cross], dim=-1)]
        for products, one in zip(cross, others):
            inner = [torch.einsum("jd,jd->j", one, other)[None].expand(shape) for other in others]
            rows.append(torch.stack([products, *inner], dim=-1))
        return torch.sqrt(torch.abs(torch.det(torch.stack(rows, dim=-2))))

    def step():
        leaf = tensor.clone().requires_grad_()
        anchor, *others = leaf.unbind(1)
        forward = volumes(anchor, others)
        backward = forward if shared else volumes(anchor, others)
        entropy = torch.nn.functional.cross_entropy
        value = 0.5 * (entropy(-forward / TEMPERATURE, target) + entropy(-backward.T / TEMPERATURE, target))
        value.backward()
        return leaf.grad

    return step


def whole_matrix_gram_loss(z: jax.Array) -> jax.Array:
    """The scores of gramjax as one matrix that JAX differentiates."""
    logits = -volume_scores(z[:, 0], z[:, 1:]) / TEMPERATURE
    negatives = ~jnp.eye(len(z), dtype=bool)
    rows, columns = (softmax_nll(x, jnp.diagonal(logits), negatives, 0.0) for x in (logits, logits.T))
    return 0.5 * jnp.mean(rows + columns)


def value_and_gradient(loss: Callable, z: jax.Array) -> Step:
    return functools.partial(jax.jit(jax.value_and_grad(loss)), z)


def products(batch: int, dim: int, precision: jax.lax.PrecisionLike = EXACT) -> tuple[Step, float]:
    """A contiguous matrix product, and how many of its time those of one modality and `batch` examples take."""
    size = min(batch, 2048 if jax.default_backend() == "cpu" else 8192)
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((size, dim), (dim, size)))
    return functools.partial(jax.jit(functools.partial(jnp.matmul, precision=precision)), a, b), 4 * (batch / size) ** 2


def compare(steps: Mapping[str, Step], repeats: int) -> dict[str, float]:
    """Seconds of each: the fastest of alternating runs, compilation left out."""
    for step in steps.values():
        jax.block_until_ready(step())
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats):
        for name, step in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(step())
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def unit_vectors(batch: int, k: int, dim: int) -> jax.Array:
    """Loosely related unit vectors, float32."""
    rng = np.random.default_rng(0)
    z = np.empty((batch, k, dim), np.float32)
    for start in range(0, batch, 1024):  # in parts, so that making them is not what takes the most memory
        part = z[start : start + 1024]
        part[:] = rng.normal(size=(len(part), 1, dim)) + rng.normal(size=part.shape)
        part /= np.linalg.norm(part, axis=-1, keepdims=True)
    return jnp.asarray(z)


def against_other_forms(options: Options) -> list[Row]:
    """Against the published form and the whole matrix."""
    rows = []
    for k in options.modalities:
        for batch in options.batch_sizes:
            z = unit_vectors(batch, k, options.dim)
            steps = {
                "gramjax": value_and_gradient(losses.gram_loss, z),
                "published, JAX": value_and_gradient(published_gram_loss, z),
                "whole matrix": value_and_gradient(whole_matrix_gram_loss, z),
            }
            if importlib.util.find_spec("torch"):
                steps["published, PyTorch"] = published_gram_loss_in_torch(np.asarray(z), shared=False)
                steps["published, PyTorch, volumes once"] = published_gram_loss_in_torch(np.asarray(z), shared=True)
            rows += _rows("other forms", compare(steps, options.repeats), batch, k, options.dim)
    return rows


def against_the_floor(options: Options) -> list[Row]:
    """Against the matrix products of a loss that holds nothing; over batch sizes, modalities and dimensions."""
    largest = max(options.batch_sizes)
    shapes = [(batch, k, options.dim) for k in options.modalities for batch in options.large_batch_sizes]
    shapes += [(largest, k, options.dim) for k in options.sizes]
    shapes += [(largest, min(options.modalities), dim) for dim in options.dims]
    rows = []
    for batch, k, dim in dict.fromkeys(shapes):
        for name in PRECISIONS if jax.default_backend() != "cpu" else ("float32",):
            rows += _against_products(name, batch, k, dim, options.repeats)
    return rows


def _against_products(name: str, batch: int, k: int, dim: int, repeats: int) -> list[Row]:
    product, times = products(batch, dim, PRECISIONS[name])
    loss = functools.partial(losses.gram_loss, precision=PRECISIONS[name])
    floor = "products" if name == "float32" else f"products, {name}"
    steps = {"gramjax": value_and_gradient(loss, unit_vectors(batch, k, dim)), floor: product}
    seconds = compare(steps, repeats)
    seconds[floor] *= times * (k - 1)
    return _rows("floor" if name == "float32" else f"floor, {name}", seconds, batch, k, dim)


def against_svd(options: Options) -> list[Row]:
    """The spectrum of PMRL against XLA's singular value decomposition and a copy of the vectors."""
    rows = []
    for shape in options.spectra:
        z = unit_vectors(*shape)
        forms = {"gramjax": linalg.spectrum, "jnp.linalg.svd": plain_spectrum}
        steps = {name: value_and_gradient(spectral_loss(form), z) for name, form in forms.items()}
        steps["copy"] = functools.partial(jax.jit(lambda z: z + 1), z)
        rows += _rows("spectrum", compare(steps, options.repeats), *shape)
    return rows


def memory(options: Options) -> list[Row]:
    """Peak memory of a process that computes one value and gradient."""
    k = max(options.modalities)
    rows: list[Row] = []
    batches = list(options.memory_batch_sizes)
    if _in_a_process(_platform)["platform"] != "cpu":
        batches += options.accelerator_batch_sizes
    for batch in batches:
        try:
            rows.append({"study": "memory", **_in_a_process(_peak, batch, k, options.dim)})
        except MemoryError as error:
            print(f"memory: a batch of {batch} does not fit ({error})", file=sys.stderr)
            break
    return rows


def many_spectra(options: Options) -> list[Row]:
    """Time and memory of the spectra of very many items."""
    return [{"study": "many spectra", **_in_a_process(_many_spectra, *shape)} for shape in options.many_spectra]


def devices(options: Options) -> list[Row]:
    """A batch that grows with the number of devices, and one that does not, divided over simulated devices."""
    rows = []
    k = min(options.modalities)
    for study, growth in (("batch grows with the devices", 1), ("batch divided over devices", 0)):
        for count in options.devices:
            batch = options.device_batch * (count if growth else max(options.devices))
            arguments = (count, batch, k, options.dim, options.repeats)
            rows.append({"study": study, **_in_a_process(_on_devices, *arguments, simulated=count)})
    return rows


def _platform() -> Row:
    return {"platform": jax.default_backend()}


def _peak(batch: int, k: int, dim: int) -> Row:
    z = unit_vectors(batch, k, dim)
    before = _peak_so_far()
    jax.block_until_ready(value_and_gradient(losses.gram_loss, z)())
    return {"batch": batch, "modalities": k, "dim": dim, "bytes": _peak_so_far(), "bytes_before": before}


def _many_spectra(batch: int, k: int, dim: int) -> Row:
    step = value_and_gradient(spectral_loss(linalg.spectrum), unit_vectors(batch, k, dim))
    seconds = compare({"gramjax": step}, 1)["gramjax"]
    return {"batch": batch, "modalities": k, "dim": dim, "seconds": seconds, "bytes": _peak_so_far()}


def _peak_so_far() -> int:
    if stats := jax.local_devices()[0].memory_stats():  # an accelerator's
        return stats["peak_bytes_in_use"]
    # On Linux, getrusage would count what the parent held when it started this process.
    if (status := Path("/proc/self/status")).exists():
        return next(
            1024 * int(line.split()[1])
            for line in status.read_text(encoding="ascii").splitlines()
            if line.startswith("VmHWM")
        )
    # In bytes on macOS, in kilobytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _on_devices(count: int, batch: int, k: int, dim: int, repeats: int) -> Row:
    mesh = jax.make_mesh((count,), ("data",))
    z = jax.device_put(np.asarray(unit_vectors(batch, k, dim)), NamedSharding(mesh, PartitionSpec("data")))
    loss = jax.jit(jax.value_and_grad(functools.partial(losses.gram_loss, axis_name="data", mesh=mesh)))
    compiled = loss.lower(z).compile()
    seconds = compare({"gramjax": functools.partial(compiled, z)}, repeats)["gramjax"]
    used = compiled.memory_analysis()
    assert used is not None  # every backend of these versions of JAX reports it
    held = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    return {"batch": batch, "modalities": k, "dim": dim, "devices": count, "seconds": seconds, "bytes": held}


def _in_a_process(function: Callable[..., Row], *arguments: int, simulated: int = 0) -> Row:
    """What `function` returns in a process of its own, on this machine's device or on simulated ones.

    Raises:
      MemoryError: it needed more memory than there is.
    """
    code = (
        "import json; from experiments import benchmark; benchmark.end_with_standard_input(); "
        f"print(json.dumps(benchmark.{function.__name__}{arguments}))"
    )
    environment = dict(os.environ)
    if simulated:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={simulated}"
        environment |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    reading, writing = os.pipe()
    with os.fdopen(writing, "w"), os.fdopen(reading) as until_we_end:
        done = subprocess.run(command, env=environment, check=False, stdin=until_we_end, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL or "RESOURCE_EXHAUSTED" in done.stderr:
        raise MemoryError(f"exit status {done.returncode}")
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def end_with_standard_input() -> None:
    """Ends this process when the one that holds the other end of its standard input does, even if that is killed."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _rows(study: str, seconds: Mapping[str, float], batch: int, k: int, dim: int) -> list[Row]:
    ours = seconds["gramjax"]
    shape = {"study": study, "batch": batch, "modalities": k, "dim": dim, "seconds": ours}
    return [
        {**shape, "against": name, "seconds_against": other, "ratio": other / ours}
        for name, other in seconds.items()
        if name != "gramjax"
    ]


def table(rows: list[Row]) -> str:
    """Markdown tables: times side by side, then what has no other side."""
    lines = ["| study | against | B | k | d | gramjax, ms | other, ms | other / gramjax | gramjax / other |"]
    lines.append("| --- | --- |" + " --: |" * 7)
    for row in rows:
        if "against" in row:
            shape = " | ".join(str(row[name]) for name in ("study", "against", "batch", "modalities", "dim"))
            times = f"{1e3 * row['seconds']:.1f} | {1e3 * row['seconds_against']:.1f}"
            lines.append(f"| {shape} | {times} | {row['ratio']:.2f} | {1 / row['ratio']:.2f} |")
    lines += ["", "| study | devices | B | k | d | ms | memory, MB |", "| --- |" + " --: |" * 6]
    for row in rows:
        if "bytes" in row:
            shape = f"{row['batch']} | {row['modalities']} | {row['dim']}"
            seconds = f"{1e3 * row['seconds']:.1f}" if "seconds" in row else ""
            lines.append(
                f"| {row['study']} | {row.get('devices', 1)} | {shape} | {seconds} | {row['bytes'] / 1e6:.0f} |"
            )
    return "\n".join(lines)


def curves(rows: list[Row], options: Options) -> dict[tuple[str, str, str], dict[str, figures.Curve]]:
    """What is drawn: `(title, x, y)` of a panel -> label -> points."""
    few, many = min(options.modalities), max(options.modalities)
    largest = max(options.batch_sizes)
    panels: dict[tuple[str, str, str], dict[str, figures.Curve]] = {}

    def add(panel, label, x, y, chosen):
        points: dict[float, float] = {}
        for row in chosen:
            points[row[x]] = min(row[y], points.get(row[x], float("inf")))
        if points:
            panels.setdefault(panel, {})[label] = sorted(points), [points[at] for at in sorted(points)]

    timed = [row for row in rows if row["study"] in ("other forms", "floor")]
    for k in (few, many):
        chosen = [row for row in timed if (row["modalities"], row["dim"]) == (k, options.dim)]
        panel = (f"{k} modalities, d = {options.dim}", "batch", "seconds")
        add(panel, "gramjax", "batch", "seconds", chosen)
        for name in dict.fromkeys(row["against"] for row in chosen):
            add(panel, name, "batch", "seconds_against", [row for row in chosen if row["against"] == name])
    floor = [row for row in rows if row["study"] == "floor" and row["batch"] == largest]
    for x, chosen in (
        ("modalities", [row for row in floor if row["dim"] == options.dim]),
        ("dim", [row for row in floor if row["modalities"] == few]),
    ):
        add((f"B = {largest}", x, "seconds"), "gramjax", x, "seconds", chosen)
        add((f"B = {largest}", x, "seconds"), "products", x, "seconds_against", chosen)
    add(
        ("peak of the process", "batch", "bytes"),
        "gramjax",
        "batch",
        "bytes",
        [r for r in rows if r["study"] == "memory"],
    )
    for study in ("batch grows with the devices", "batch divided over devices"):
        chosen = [row for row in rows if row["study"] == study]
        add(("memory of a device", "devices", "bytes"), study, "devices", "bytes", chosen)
        add(("time on simulated devices", "devices", "seconds"), study, "devices", "seconds", chosen)
    return panels


def check(options: Options) -> None:
    """Raises a ValueError that names an option which nothing could be measured with."""
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        least = {"modalities": 2, "sizes": 2}.get(field.name, 1)
        if value == ():
            raise ValueError(f"{name} must list at least one number.")
        if not isinstance(value, Path) and min(jax.tree.leaves(value)) < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def main(options: Options) -> None:
    """Measures all; what is measured so far stays in a file beside the output if a later study fails."""
    check(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_suffix(".partial.json")
    rows: list[Row] = []
    record: Row = {"jax": jax.__version__, "rows": rows}
    # First what runs in processes of its own: an accelerator has one owner at a time.
    for study in (devices, memory, many_spectra, against_other_forms, against_the_floor, against_svd):
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"measuring: {study.__name__.replace('_', ' ')}", file=sys.stderr)
        rows += study(options)
    record["device"] = jax.devices()[0].device_kind
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(options.output)
    print(f"value and gradient, {record['device']}, jax {jax.__version__}\n\n{table(rows)}")
    figures.scaling(curves(rows, options), options.output.with_suffix(".png"))


if __name__ == "__main__":
    with interrupts_end_at_once("interrupted: what was measured is in the .partial.json"), one_line_errors():
        main(tyro.cli(Options, description=__doc__))

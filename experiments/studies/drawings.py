"""The pictures of the studies: dots with spreads, lines with bands, heat maps, scatter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from experiments.figures import DPI, LINE_STYLES, MARKERS, PALETTE, STYLE

COLOURS = 128
Spread = Mapping[str, Any]
"""`study.spread`: mean, std and values over seeds."""


def dots(
    rows: Mapping[str, Mapping[str, Spread]], series: Mapping[str, str], path: Path, *, title: str, x: str, scale=100.0
) -> None:
    """Every row's figures side by side: the mean a marker, every seed a thin line.

    Args:
      rows: row's name to figure to spread.
      series: label to the name of a figure.
      path: the PNG to write.
      title: above.
      x: label of the axis.
      scale: of the figures: 100 for per cent.
    """
    with mpl.rc_context(STYLE):
        figure = _figure(7.5, 1.2 + 0.32 * len(rows) + 0.18 * len(series))
        axes = figure.subplots()
        for number, (label, name) in enumerate(series.items()):
            colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
            shift = 0.5 * (number / max(len(series) - 1, 1) - 0.5) if len(series) > 1 else 0.0
            for place, row in enumerate(rows.values()):
                if name in row:
                    values = scale * np.asarray(row[name]["values"])
                    axes.plot([values.min(), values.max()], [place + shift] * 2, color=colour, linewidth=1.2, alpha=0.6)
                    axes.plot(scale * row[name]["mean"], place + shift, marker, color=colour, markersize=5)
            axes.plot([], [], marker, color=colour, markersize=5, label=label)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set(xlabel=x, title=title)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.grid(axis="x", color="#EEEEEE", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        _save(figure, path)


def lines(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[Spread]]]],
    path: Path,
    *,
    x: str | Sequence[str],
    y: str,
    scale: float = 100.0,
    logarithmic: Literal["", "x", "xy"] = "",
    columns: int = 3,
) -> None:
    """Means over `x`, with bands of a standard deviation, or from the least to the most where `y` is logarithmic.

    Args:
      panels: title of a panel to label to places and spreads.
      path: the PNG to write.
      x: label of the axis, of all panels or of each.
      y: label of the other.
      scale: of the figures: 100 for per cent.
      logarithmic: which axes are.
      columns: of panels.
    """
    with mpl.rc_context(STYLE):
        columns = min(columns, len(panels))
        rows = -(-len(panels) // columns)
        figure = _figure(3.4 * columns + 1.6, 3.0 * rows)
        grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
        styles: dict[str, int] = {}
        labels = [x] * len(panels) if isinstance(x, str) else x
        for axes, below, (title, curves) in zip(grid, labels, panels.items()):
            for label, (places, spreads) in curves.items():
                number = styles.setdefault(label, len(styles))
                mean, std = (scale * np.array([one[part] for one in spreads]) for part in ("mean", "std"))
                low, high = mean - std, mean + std
                if "y" in logarithmic:
                    low, high = (scale * np.array([end(one["values"]) for one in spreads]) for end in (min, max))
                options = {"color": PALETTE[number % len(PALETTE)], "linestyle": LINE_STYLES[number // len(PALETTE)]}
                axes.plot(places, mean, marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=1.3, **options)
                axes.fill_between(places, low, high, color=options["color"], alpha=0.15, linewidth=0)
            _finish(
                axes, title, below, y, sorted({place for places, _ in curves.values() for place in places}), logarithmic
            )
        for axes in grid[len(panels) :]:
            axes.axis("off")
        handles = [
            Line2D(
                [], [], color=PALETTE[number % len(PALETTE)], marker=MARKERS[number % len(MARKERS)], markersize=4,
                linestyle=LINE_STYLES[number // len(PALETTE)], label=label,
            )
            for label, number in styles.items()
        ]  # fmt: skip
        figure.legend(handles=handles, fontsize=7.5, loc="outside right upper")
        _save(figure, path)


def heat_maps(matrices: Mapping[str, np.ndarray], names: Sequence[str], path: Path, *, y: str, x: str) -> None:
    """Square matrices side by side on one scale, each under its title, NaN where nothing was measured."""
    with mpl.rc_context(STYLE):
        columns = min(3, len(matrices))
        rows = -(-len(matrices) // columns)
        side = 0.9 + 0.42 * len(names)
        figure = _figure(side * columns + 1.2, side * rows + 0.3)
        grid = np.ravel(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True))
        low = min(0.0, min(float(np.nanmin(matrix)) for matrix in matrices.values()))
        high = max(float(np.nanmax(matrix)) for matrix in matrices.values())
        shades = mpl.colormaps["cividis"].with_extremes(bad="#F2F2F2")
        for number, (axes, (title, matrix)) in enumerate(zip(grid, matrices.items())):
            image = axes.imshow(np.ma.masked_invalid(matrix), cmap=shades, vmin=low, vmax=high)
            for (row, column), value in np.ndenumerate(matrix):
                if np.isfinite(value):
                    ink = "white" if value < low + 0.55 * (high - low) else "black"
                    axes.text(column, row, f"{round(value)}", ha="center", va="center", color=ink, fontsize=6.5)
            axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
            axes.set_yticks(range(len(names)), names, fontsize=7)
            axes.set_title(title)
            lowest = number >= len(matrices) - columns
            axes.tick_params(length=0, labelbottom=lowest)
            axes.spines[:].set_visible(False)
            axes.set(xlabel=x if lowest else "", ylabel=y if number % columns == 0 else "")
        for axes in grid[len(matrices) :]:
            axes.axis("off")
        figure.colorbar(image, ax=list(grid), shrink=min(1.0, 1.4 / rows), aspect=30).outline.set_visible(False)
        _save(figure, path)


def scatter(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], path: Path, *, x: str, y: str
) -> None:
    """Points: title of a panel to label to x and y."""
    with mpl.rc_context(STYLE):
        figure = _figure(3.4 * len(panels) + 1.6, 3.4)
        grid = np.ravel(figure.subplots(1, len(panels), squeeze=False))
        labels: dict[str, int] = {}
        for axes, (title, clouds) in zip(grid, panels.items()):
            for label, points in clouds.items():
                number = labels.setdefault(label, len(labels))
                marker, colour = MARKERS[number % len(MARKERS)], PALETTE[number % len(PALETTE)]
                axes.plot(*points, marker, color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0)
            axes.set(title=title, xlabel=x, ylabel=y)
            axes.grid(color="#EEEEEE", linewidth=0.8)
            axes.set_axisbelow(True)
        handles = [
            Line2D(
                [], [], color=PALETTE[number % len(PALETTE)], marker=MARKERS[number % len(MARKERS)], linestyle="",
                markersize=4, label=label,
            )
            for label, number in labels.items()
        ]  # fmt: skip
        figure.legend(handles=handles, fontsize=7.5, loc="outside right upper")
        _save(figure, path)


def _finish(axes: Axes, title: str, x: str, y: str, ticks: Sequence[float], logarithmic: str) -> None:
    if "y" in logarithmic:
        axes.set_yscale("log", nonpositive="clip")
    if "x" in logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    # A palette says all that these drawings hold in a third of the bytes.
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)

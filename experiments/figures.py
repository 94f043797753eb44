"""The pictures `evaluate.py` and `search.py` draw: retrieval gallery, curves, embedding map, heat map, contact sheet.

Every function takes arrays, writes one PNG and returns its path; nothing here opens a display.
"""

import dataclasses
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

# Okabe and Ito's palette: told apart by readers of every colour vision, and in grey.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINE_STYLES = ("-", "--", ":", "-.")
INK, FAINT, RIGHT = "#222222", "#8A8A8A", "#0072B2"
DPI = 150
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.sans-serif": [
        "DejaVu Sans",
        "Noto Sans CJK SC",
        "Noto Sans CJK JP",
        "WenQuanYi Zen Hei",
        "PingFang SC",
        "SimHei",
    ],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


Curve = tuple[list[float], list[float]]


@dataclasses.dataclass(frozen=True)
class Found:
    """One item that came back: its picture `[H, W, 3]` in [0, 1], its name, and whether it is the right one."""

    picture: np.ndarray
    name: str
    right: bool = False


@dataclasses.dataclass(frozen=True)
class GalleryRow:
    """One query and what came back, best first.

    Attributes:
      query: text, or a picture `[H, W, 3]` in [0, 1], or a waveform `[samples]`.
      name: the name of the query's item, written under a picture or a waveform.
      found: the best items.
      answer: the right item.
      rank: where the right item came, 1 is first.
    """

    query: str | np.ndarray
    name: str
    found: Sequence[Found]
    answer: Found
    rank: int


def retrieval_gallery(
    sections: Mapping[str, Sequence[GalleryRow]], path: pathlib.Path, *, title: str, caption: str
) -> pathlib.Path:
    """Queries on the left, what came back in the middle with the right item framed, the right item and its rank last.

    Args:
      sections: heading (such as "text -> picture") to its rows.
      path: the PNG to write.
      title: above the picture.
      caption: below it: says how the queries were picked.
    """
    columns = max(len(row.found) for rows in sections.values() for row in rows)
    query_width, heading, cell = 2.3, 0.36, 0.97
    width = query_width + columns + 1.65
    height = sum(heading + cell * len(rows) for rows in sections.values())
    with mpl.rc_context(STYLE):
        figure = _figure(width * 0.93, (height + 0.95) * 0.93)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height + 0.5, -0.45))
        axes.axis("off")
        axes.text(0.12, -0.2, title, fontsize=12, fontweight="bold", va="center")
        top = 0.0
        for name, rows in sections.items():
            axes.plot([0.12, width - 0.12], [top + 0.03] * 2, color="#DDDDDD", linewidth=0.8)
            axes.text(0.12, top + heading * 0.6, name, fontsize=9.5, fontweight="bold", va="center", color=RIGHT)
            axes.text(query_width, top + heading * 0.6, "best first", fontsize=7.5, va="center", color=FAINT)
            axes.text(width - 1.42, top + heading * 0.6, "right answer", fontsize=7.5, va="center", color=FAINT)
            top += heading
            for row in rows:
                _gallery_row(axes, row, top, query_width, columns)
                top += cell
        lines = textwrap.fill(caption, int(15 * width), max_lines=2, placeholder=" …")  # 16 letters to a unit of width
        axes.text(0.12, height + 0.25, lines, fontsize=7.5, color=FAINT, va="center")
        return _save(figure, path)


def training_curves(records: Sequence[Mapping[str, float]], path: pathlib.Path) -> pathlib.Path:
    """Losses, validation metrics and the learning rate over steps, from the lines of a run's `metrics.jsonl`.

    Quantities that share what comes before their last `/` share a panel; those seen fewer than twice are left out.
    """
    series: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    panels = _panels(series)
    if not panels:
        raise ValueError("records: no quantity was written at two steps, there is no curve to draw")

    with mpl.rc_context(STYLE):
        columns = len(panels) if len(panels) < 3 else 2 if len(panels) == 4 else 3
        rows = -(-len(panels) // columns)
        figure = _figure(8.0 if columns > 1 else 5.0, 2.9 * rows, layout="constrained")
        for axes, (panel, curves) in zip(np.ravel(figure.subplots(rows, columns, squeeze=False)), panels.items()):
            for number, (label, (steps, values)) in enumerate(curves.items()):
                colour, style = PALETTE[number % len(PALETTE)], LINE_STYLES[number // len(PALETTE) % len(LINE_STYLES)]
                faint = len(values) > 60
                axes.plot(steps, values, color=colour, linewidth=1, linestyle=style, alpha=0.25 if faint else 1)
                if faint:
                    axes.plot(*_smoothed(steps, values), color=colour, linewidth=1.4, linestyle=style)
                axes.plot([], [], color=colour, linestyle=style, label=label)
            axes.set_title(panel.replace("_", " "))
            axes.set_xlabel("step")
            axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
            axes.set_axisbelow(True)
            if list(curves) != [panel.replace("_", " ")]:
                axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.24), ncols=1 + (len(curves) > 3))
        for axes in figure.axes[len(panels) :]:
            axes.axis("off")
        return _save(figure, path)


def scaling(panels: Mapping[tuple[str, str, str], Mapping[str, Curve]], path: pathlib.Path) -> pathlib.Path:
    """Doubly logarithmic curves: `(title, x axis, y axis)` of a panel -> label -> points."""
    with mpl.rc_context(STYLE):
        rows = -(-len(panels) // 3)
        figure = _figure(9.0, 3.6 * rows, layout="constrained")
        colours: dict[str, str] = {}
        for axes, ((title, x, y), lines) in zip(np.ravel(figure.subplots(rows, 3, squeeze=False)), panels.items()):
            for label, points in lines.items():
                colour = colours.setdefault(label, PALETTE[len(colours) % len(PALETTE)])
                marker = MARKERS[PALETTE.index(colour) % len(MARKERS)]
                axes.loglog(*points, color=colour, marker=marker, markersize=4, linewidth=1.3, label=label)
            # Only what was measured is marked on the axis.
            ticks = sorted({value for points in lines.values() for value in points[0]})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_title(title)
            axes.set_xlabel(x)
            axes.set_ylabel(y)
            axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(-0.1, -0.2))
        for axes in figure.axes[len(panels) :]:
            axes.axis("off")
        return _save(figure, path)


def embedding_map(
    embeddings: Mapping[str, np.ndarray],
    labels: np.ndarray,
    categories: Sequence[str],
    path: pathlib.Path,
    *,
    joined: int = 24,
) -> pathlib.Path:
    """Every embedding on the first two principal axes of them all: colour is category, marker is modality.

    Args:
      embeddings: modality to `[N, dim]`.
      labels: `[N]`, index into `categories`.
      categories: their names, eight at most.
      path: the PNG to write.
      joined: how many items, evenly spaced through the list, have their modalities joined by thin lines.
    """
    stacked = np.stack(list(embeddings.values()), axis=1).astype(np.float64)
    centred = stacked - stacked.mean(axis=(0, 1))
    _, spread, axes_ = np.linalg.svd(centred.reshape(-1, centred.shape[-1]), full_matrices=False)
    points = centred @ axes_[:2].T
    share = spread[:2] ** 2 / np.sum(spread**2)
    items = evenly_spaced(len(points), joined)
    with mpl.rc_context(STYLE):
        figure = _figure(8.0, 5.6, layout="constrained")
        axes = figure.subplots()
        for position, (marker, _) in enumerate(zip(MARKERS, embeddings)):
            colours = [PALETTE[label] for label in labels]
            axes.scatter(*points[:, position].T, s=13, c=colours, marker=marker, alpha=0.5, linewidths=0)
        for item in items:
            centre = points[item].mean(axis=0)
            for point in points[item]:
                axes.plot(*np.stack([centre, point]).T, color=INK, linewidth=0.6, alpha=0.7, zorder=3)
            for marker, point in zip(MARKERS, points[item]):
                colour = PALETTE[labels[item]]
                axes.scatter(*point, s=26, color=colour, marker=marker, edgecolors=INK, linewidths=0.6, zorder=4)
        axes.set(xlabel=f"first principal axis ({share[0]:.0%} of the variance)")
        axes.set(ylabel=f"second principal axis ({share[1]:.0%})")
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(f"{len(points)} test items; lines join the modalities of {len(items)} of them, evenly spaced")
        modality = [
            Line2D([], [], color=INK, markerfacecolor="white", marker=marker, linestyle="", label=name)
            for marker, name in zip(MARKERS, embeddings)
        ]
        category = [
            Line2D([], [], color=colour, marker="o", linestyle="", label=name)
            for colour, name in zip(PALETTE, categories)
        ]
        blank = Line2D([], [], linestyle="", label=" ")
        figure.legend(handles=[*modality, blank, *category], loc="outside right center", fontsize=8, handletextpad=0.2)
        return _save(figure, path)


def recall_heatmap(recall: np.ndarray, names: Sequence[str], path: pathlib.Path, *, title: str) -> pathlib.Path:
    """Any-to-any recall in per cent: rows ask, columns answer. `recall` is `[k, k]` in [0, 1], NaN where none."""
    with mpl.rc_context(STYLE):
        side = 1.6 + 0.85 * len(names)
        figure = _figure(side + 0.9, side, layout="constrained")
        axes = figure.subplots()
        shades = mpl.colormaps["cividis"].with_extremes(bad="#F2F2F2")
        highest = max(100 * float(np.nanmax(recall)), 5.0)
        image = axes.imshow(100 * np.ma.masked_invalid(recall), cmap=shades, vmin=0, vmax=highest)
        for (row, column), value in np.ndenumerate(100 * recall):
            if np.isfinite(value):
                ink = "white" if value < 0.55 * highest else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=ink, fontsize=11)
        axes.set_xticks(range(len(names)), names, rotation=35 if len(names) > 4 else 0)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="answer", ylabel="query")
        axes.set_title(title)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(len(names) - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="minor", length=0)
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.outline.set_visible(False)
        return _save(figure, path)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One item of a contact sheet: a picture `[H, W, 3]` in [0, 1], a waveform `[samples]`, or None; two lines."""

    look: np.ndarray | None
    name: str
    note: str


def contact_sheet(cells: Sequence[Cell], path: pathlib.Path, *, title: str, columns: int = 5) -> pathlib.Path:
    """Items in rows, in the order given, each with its name and a note below it."""
    rows = -(-len(cells) // columns)
    with mpl.rc_context(STYLE):
        figure = _figure(1.9 * columns, 1.9 * rows + 0.5, layout="constrained")
        heading = textwrap.shorten(drawable(title, "?"), 110, placeholder=" …")
        figure.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold", parse_math=False)
        grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
        for axes in grid:
            axes.set_axis_off()
        for axes, cell in zip(grid, cells):
            name = drawable(cell.name, "?")
            name = name if len(name) <= 26 else name[:25].rstrip() + "…"
            axes.text(0.5, -0.04, name, transform=axes.transAxes, ha="center", va="top", fontsize=8, parse_math=False)
            axes.text(0.5, -0.17, cell.note, transform=axes.transAxes, ha="center", va="top", fontsize=7, color=FAINT)
            if cell.look is None:
                axes.text(0.5, 0.5, "no picture", transform=axes.transAxes, ha="center", va="center", color=FAINT)
            elif cell.look.ndim == 1:
                low, high = _envelope(cell.look, 160)
                axes.set(xlim=(0, len(low)), ylim=(-1.6, 1.6))
                axes.fill_between(np.arange(len(low)), low, high, color="#555555", linewidth=0.3)
            else:
                axes.imshow(np.clip(cell.look, 0, 1), interpolation="bilinear")
        return _save(figure, path)


def drawable(text: str, fallback: str) -> str:
    """`text` if some installed font can draw all of it (Chinese needs one that many machines lack), else `fallback`."""
    needed = {ord(character) for character in text if not character.isspace()}
    for family in STYLE["font.sans-serif"]:
        try:
            file = font_manager.findfont(family, fallback_to_default=False)
        except ValueError:
            continue
        needed -= set(font_manager.get_font(file).get_charmap())
    return fallback if needed else text


def _gallery_row(axes: Axes, row: GalleryRow, top: float, query_width: float, columns: int) -> None:
    if isinstance(row.query, str):
        lines = textwrap.fill(row.query, 30, max_lines=3, placeholder=" …")
        axes.text(0.12, top + 0.33, lines, va="center", fontsize=8.5)
    elif row.query.ndim == 1:
        low, high = _envelope(row.query, 160)
        across = np.linspace(0.15, query_width - 0.45, len(low))
        axes.fill_between(across, top + 0.27 - 0.22 * high, top + 0.27 - 0.22 * low, color="#555555", linewidth=0.3)
        axes.text(0.12, top + 0.64, f"“{textwrap.shorten(row.name, 34, placeholder=' …')}”", va="center", fontsize=8)
    else:
        _picture(axes, row.query, 0.12, top)
        axes.text(0.84, top + 0.29, textwrap.fill(row.name, 16, max_lines=3, placeholder=" …"), va="center", fontsize=8)
    for column, found in enumerate(row.found):
        _found(axes, found, query_width + column, top, framed=found.right)
    left = query_width + columns + 0.2
    _found(axes, row.answer, left, top, framed=False)
    axes.text(
        left + 0.68,
        top + 0.32,
        f"rank {row.rank}",
        va="center",
        fontsize=8.5,
        fontweight="bold" if row.rank == 1 else "normal",
    )


def _found(axes: Axes, found: Found, left: float, top: float, *, framed: bool) -> None:
    _picture(axes, found.picture, left, top)
    if framed:
        axes.add_patch(Rectangle((left - 0.045, top + 0.005), 0.70, 0.64, fill=False, edgecolor=RIGHT, linewidth=2.2))
    name = textwrap.fill(found.name, 15, max_lines=2, placeholder="…")  # what fits between two neighbours
    axes.text(left + 0.305, top + 0.69, name, ha="center", va="top", fontsize=6.5, color=INK if framed else FAINT)


def _picture(axes: Axes, picture: np.ndarray, left: float, top: float, side: float = 0.58) -> None:
    extent = (left + 0.015, left + 0.015 + side, top + 0.03 + side, top + 0.03)
    axes.imshow(np.clip(picture, 0, 1), extent=extent, interpolation="bilinear", aspect="auto", zorder=2)


def _envelope(waveform: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    parts = np.array_split(waveform / max(float(np.abs(waveform).max()), 1e-9), bins)
    return np.array([part.min() for part in parts]), np.array([part.max() for part in parts])


def _panels(series: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Panel to label to curve, losses and validation first; curves that coincide share a label."""
    panels: dict[str, dict[str, Curve]] = {}
    for name, curve in series.items():
        if len(curve[0]) > 1:
            panel, _, label = name.rpartition("/")
            curves = panels.setdefault(panel or name, {})
            label = label.replace("_", " ")
            if same := next((known for known, other in curves.items() if other == curve), None):
                curves[f"{same} (that of {label})"] = curves.pop(same)
            else:
                curves[label] = curve
    first = [panel for panel in panels if "loss" in panel] + [panel for panel in panels if "validation" in panel]
    return {panel: panels[panel] for panel in [*first, *(panel for panel in panels if panel not in first)]}


def _smoothed(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    width = max(len(values) // 40, 2)
    kernel = np.ones(width) / width
    return np.convolve(steps, kernel, mode="valid"), np.convolve(values, kernel, mode="valid")


def evenly_spaced(count: int, wanted: int) -> np.ndarray:
    """Up to `wanted` indices spread evenly over `0 .. count - 1`, both ends included."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


def _figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path

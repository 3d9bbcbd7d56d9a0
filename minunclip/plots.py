"""Pictures about pictures: how one was made, stage by stage; and figures of the notebooks, each with words for who cannot see it."""

import base64
import html
import io
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from minunclip.training import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRAMES = 6  # of the base image as it forms


def evenly(frames: Sequence[np.ndarray], count: int = FRAMES) -> list[tuple[int, np.ndarray]]:
    """At most `count` of the frames, evenly spaced with both ends, each with its step, counted from 1."""
    chosen = sorted({round(i) for i in np.linspace(0, len(frames) - 1, min(count, len(frames)))})
    return [(i + 1, frames[i]) for i in chosen]


def save_figure(path: Path, figure: "Figure", facts: dict[str, object], dpi: int) -> None:
    """Writes a figure as a PNG that keeps `facts` as text, as `safety.save_picture` does for a picture."""
    written = {key: str(value) for key, value in facts.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a caption in a script that the font lacks, which shows as boxes
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi, metadata=written))


def stages_figure(
    path: Path, caption: str, candidates: Sequence[float], frames: Sequence[np.ndarray], pictures: dict[int, np.ndarray], facts: dict[str, object]
) -> None:
    """Writes the labelled strip: caption, the prior's candidates with their z_i . z_t, the base image forming, a picture of each size.

    `frames`: the decoder's x_0 at every step, uint8 (H, W, 3). `pictures`: by side, uint8 (side, side, 3).
    `facts`: how it was made, kept in the file as `safety.save_picture` does.
    """
    from matplotlib.figure import Figure

    shown = [(f"step {step} of {len(frames)}", frame) for step, frame in evenly(frames)]
    shown += [(f"{side} × {side}", picture) for side, picture in pictures.items()]
    figure = Figure(figsize=(1.5 * (len(shown) + 2), 2.1), layout="constrained")
    words, scores, *places = figure.subplots(1, len(shown) + 2, width_ratios=[1.2, 1.2, *[1] * len(shown)])
    wrapped = textwrap.wrap(caption.replace("$", r"\$"), 16)[:7] or ["(empty)"]  # matplotlib reads $ as mathematics
    words.text(0.5, 0.5, "\n".join(wrapped), ha="center", va="center", fontsize=9, transform=words.transAxes)
    words.set_title("caption", fontsize=9)
    words.axis("off")
    best = int(np.argmax(candidates))
    bars = scores.bar([f"{i + 1}" for i in range(len(candidates))], candidates, color=["#5b8db8" if i == best else "#c9d3dc" for i in range(len(candidates))])
    scores.bar_label(bars, fmt="%.3f", fontsize=8)
    scores.set_title("prior: $z_i \\cdot z_t$", fontsize=9)
    scores.margins(y=0.15)
    scores.set_yticks([])
    scores.spines[["top", "right", "left"]].set_visible(False)
    for axes, (label, picture) in zip(places, shown):
        axes.imshow(picture, interpolation="nearest" if len(picture) < 128 else "auto")
        axes.set_title(label, fontsize=9)
        axes.axis("off")
    save_figure(path, figure, facts, dpi=160)


def loss_figure(log: Sequence[dict[str, float]], name: str) -> "Figure":
    """The loss of a log's lines against their steps, training and validation, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([x["step"] for x in log], [x["loss"] for x in log], color="#5b8db8", linewidth=1, label="training")
    checked = [x for x in log if "validation_loss" in x]
    if checked:
        axes.plot([x["step"] for x in checked], [x["validation_loss"] for x in checked], "o--", color="#c26a00", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="loss", title=name, yscale="log")
    axes.legend()
    return figure


def bands_figure(bands: dict[str, dict[str, list[float]]], log: Sequence[dict[str, float]]) -> "Figure":
    """A panel for each band (by figure of the log: step, low, high), in grey, with the log's own curve on it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(bands), 2.8), layout="constrained")
    for axes, (name, band) in zip(figure.subplots(1, len(bands), squeeze=False).flat, bands.items()):
        lines = [line for line in log if name in line]
        axes.fill_between(band["step"], band["low"], band["high"], color="#c9d3dc", label="expected")
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], "o-", markersize=3, color="#c26a00", label="this run")
        axes.set(xlabel="step", title=name.replace("_", " "))
    figure.axes[0].legend(fontsize=8)
    return figure


def picture_grid(pictures: Sequence[np.ndarray], titles: Sequence[str] = (), columns: int = 8) -> "Figure":
    """uint8 pictures (H, W, 3), each under its title, in rows; wide ones get wide places."""
    from matplotlib.figure import Figure

    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    shape = max(picture.shape[1] / picture.shape[0] for picture in pictures)  # of the widest: its width over its height
    width = min(2.2 * max(1, shape), 13 / columns)
    figure = Figure(figsize=(columns * width, rows * (width / shape + (0.3 if titles else 0))), layout="constrained")
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if i < len(pictures):
            axes.imshow(pictures[i], interpolation="nearest" if len(pictures[i]) < 128 else "auto")
            if titles:
                axes.set_title("\n".join(textwrap.wrap(titles[i].replace("$", r"\$"), int(14 * width)) or [""]), fontsize=8)
    return figure


def table_figure(table: dict[str, dict[str, float]]) -> "Figure":
    """A table as bars, one panel a column, rows from above; with lines for the spread over seeds, where the table has it under "± " and the name."""
    from matplotlib.figure import Figure

    columns = [name for name in dict.fromkeys(column for row in table.values() for column in row) if not name.startswith("± ")]
    figure = Figure(figsize=(2.6 + 1.7 * len(columns), 0.9 + 0.26 * len(table)), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns):
        there = [(i, row[column], row.get(f"± {column}", 0.0)) for i, row in enumerate(table.values()) if column in row]
        places, values, spreads = zip(*there)
        axes.barh(places, values, xerr=spreads if any(spreads) else None, color="#5b8db8", ecolor="#c26a00", height=0.7)
        axes.set_title(column, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yticks(range(len(table)), list(table))
    axes.invert_yaxis()
    return figure


def curve_figure(table: dict[str, dict[str, float]], against: str) -> "Figure":
    """A table whose rows are points of curves, one panel a column, against the column `against`, or, where there is none, the number that ends a
    row's name. A row that has neither is a level, dotted. Lines stand for the spread over seeds.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    columns = [name for name in dict.fromkeys(column for row in table.values() for column in row) if not name.startswith("± ") and name != against]
    curves: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for name, row in table.items():
        number = name.rpartition(" ")[2]
        ends = number.replace(".", "").isdigit()
        x = row[against] if against in row else float(number) if ends else math.nan
        curves.setdefault(name.rpartition(",")[0] if ends else name, []).append((x, row))
    points_of = [row for points in curves.values() for x, row in points if not math.isnan(x)]
    columns = [column for column in columns if any(column in row for row in points_of)] or columns  # a level beside curves is no figure of its own
    figure = Figure(figsize=(1 + 2.9 * len(columns), 3.4), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        for k, (system, points) in enumerate(curves.items()):
            there = [(x, row[column], row.get(f"± {column}", 0.0)) for x, row in points if column in row]
            if there and math.isnan(there[0][0]):
                axes.axhline(there[0][1], color=f"C{k}", linestyle=":", label=system)
            elif there:
                places, values, spreads = zip(*there)
                axes.errorbar(places, values, yerr=spreads, color=f"C{k}", marker="os^vDPX*"[k % 8], markersize=4, capsize=2, label=system)
        axes.set(xscale="log", xlabel=against)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(column, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def show(content: "Figure | Sequence[np.ndarray]", titles: Sequence[str] = (), *, columns: int = 8, alt: str) -> None:
    """Shows a figure, or a grid of pictures, in a notebook, with `alt`: what a reader would miss who cannot see it. ValueError without."""
    from IPython.display import HTML, display
    from matplotlib.figure import Figure
    from matplotlib.pyplot import close

    figure = content if isinstance(content, Figure) else picture_grid(content, titles, columns)
    display(HTML(_image_tag(figure, alt)))
    close(figure)  # else the notebook shows it a second time, without words


def slide(draw: "Callable[[Axes, float], object]", *, alt: str, size: tuple[float, float] = (3, 3), columns: int = 6, **slider: Sequence[float]) -> None:
    """A slider over `name=values`: `draw(axes, value)` draws the frame of each. All are drawn beforehand, so the slider needs no kernel and no model.

    Above it stand all frames side by side, each `size` inches, for where no widget is shown. ValueError without `alt`, or unless one slider is given.
    """
    from IPython.display import display
    from ipywidgets import HTML, SelectionSlider, Stack, VBox, jslink
    from matplotlib.figure import Figure

    if len(slider) != 1 or not (values := list(next(iter(slider.values())))):
        raise ValueError(f"{len(slider)} sliders: give one, with its values, as in slide(draw, alt=..., guidance=[1, 2, 4])")
    name = next(iter(slider)).replace("_", " ")
    frames = []
    for value in values:
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), value)
        frames.append(HTML(_image_tag(figure, f"{alt} Here: {name} {value:g}.")))
    columns = min(columns, len(values))
    rows = -(-len(values) // columns)
    whole = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    places = list(whole.subplots(rows, columns, squeeze=False).flat)
    for axes, value in zip(places, values):
        draw(axes, value)
        axes.set_title(f"{name} {value:g}", fontsize=9)
    for axes in places[len(values) :]:
        axes.axis("off")
    show(whole, alt=alt)
    handle, stack = SelectionSlider(options=[(f"{value:g}", i) for i, value in enumerate(values)], description=name), Stack(frames, selected_index=0)
    jslink((handle, "index"), (stack, "selected_index"))
    display(VBox([handle, stack]))


def _image_tag(figure: "Figure", alt: str) -> str:
    """The figure as an HTML image that holds its own pixels. ValueError without words."""
    if not alt.strip():
        raise ValueError("a figure needs alt text: say in a sentence what it shows")
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, facecolor="white")
    Image.open(buffer).convert("RGB").save(small, format="PNG", optimize=True)  # nothing is transparent: a sixth smaller without
    return f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}">'

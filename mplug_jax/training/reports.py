"""Pictures of a run: its losses and metrics over steps, and a sheet of images with texts.

Everything is drawn without a display and without global state of matplotlib.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from mplug_jax.training.metrics import read_metrics

_LOSS_PREFIX = "train/loss"
_LEARNING_RATE_PREFIXES = ("train/learning_rate", "train/lr")

# A palette that colour-blind readers can tell apart (Okabe and Ito, without yellow).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#333333")
_INK, _QUIET, _GRID = "#222222", "#666666", "#dddddd"

_SHEET_BACKGROUND, _CARD, _CARD_EDGE = "#f2f3f5", "#ffffff", "#d9dce1"
_RIGHT, _WRONG = "#13713a", "#b3261e"
_MARGIN, _PADDING = 16, 12
_SMALL_SIDE, _LARGE_SIDE = 192, 320


def plot_losses(workdir: str | Path) -> list[Path]:
    """Draw `workdir/metrics.jsonl` into `workdir/plots`, as far as there is something to draw.

    losses.png has a panel for each `train/loss*`, raw and smoothed; learning_rate.png the learning
    rates; evaluation.png a panel for each evaluator (the part before the slash of a key that does
    not begin with `train/`), a line for each of its metrics, fractions apart from percentages;
    means of others are left out.

    Returns:
      The files written.

    Raises:
      FileNotFoundError: the folder holds no metrics.jsonl.
    """
    curves = _curves(read_metrics(workdir))
    losses = {key: curve for key, curve in curves.items() if key.startswith(_LOSS_PREFIX)}
    rates = {key: curve for key, curve in curves.items() if key.startswith(_LEARNING_RATE_PREFIXES)}
    evaluators: dict[str, dict[str, np.ndarray]] = {}
    for key, curve in curves.items():
        evaluator, _, metric = key.partition("/")
        if evaluator == "train" or not metric or metric.endswith("_mean"):
            continue
        # The first stage of retrieval beside the second, not on top of it.
        panel = f"{evaluator}, ITC alone" if metric.startswith("itc_") else evaluator
        # Fractions would lie flat beside percentages, and ranks fall where recall rises.
        if metric.endswith("_medr"):
            panel = f"{evaluator}, median rank"
        elif np.nanmax(curve[:, 1], initial=0.0) <= 1.0:
            panel = f"{panel}, fractions"
        evaluators.setdefault(panel, {})[metric.removeprefix("itc_")] = curve

    folder = Path(workdir) / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if losses:
        figure, panels = _panels(len(losses), width=4.6)
        for i, (panel, (key, curve)) in enumerate(zip(panels, sorted(losses.items()), strict=True)):
            _plot_smoothed(panel, curve, _COLOURS[i % len(_COLOURS)])
            panel.set_title(key.removeprefix("train/").replace("_", " "))
        written.append(_save(figure, folder / "losses.png"))
    if rates:
        figure, (panel,) = _panels(1, width=7.0)
        _plot_lines(panel, {key.removeprefix("train/"): curve for key, curve in rates.items()})
        panel.set_title("learning rate")
        panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        written.append(_save(figure, folder / "learning_rate.png"))
    if evaluators:
        figure, panels = _panels(len(evaluators), width=6.0)
        for panel, (evaluator, metrics) in zip(panels, sorted(evaluators.items()), strict=True):
            _plot_lines(panel, metrics)
            panel.set_title(evaluator.replace("_", " "))
        written.append(_save(figure, folder / "evaluation.png"))
    return written


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Gaussian moving average of [N] values, `width` points its standard deviation.

    Centred, so that it doesn't lag behind a falling loss; the weights at the ends and around
    values that are not finite are made to sum to one. NaN where nothing finite is near.
    """
    reach = math.ceil(3 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel)[reach : reach + len(values)]
    mass = np.convolve(finite.astype(float), kernel)[reach : reach + len(values)]
    return np.divide(total, mass, out=np.full(len(values), np.nan), where=mass > 0)


def sample_sheet(
    path: str | Path,
    images: np.ndarray,
    titles: Sequence[str],
    columns: int = 4,
    scale: int | None = None,
    ok: Sequence[bool | None] | None = None,
) -> Path:
    """Draw a grid of pictures, each on a card with its text wrapped below it.

    Args:
      path: PNG file to write; its folder is made.
      images: [N, H, W, 3] uint8.
      titles: N texts; a newline begins a new line, lines too long are wrapped.
      columns: cards in a row, fewer where there are fewer images.
      scale: whole-number magnification (nearest neighbour, so that pixels stay visible); chosen to
        make small pictures about 192 wide if None, while large ones are shrunk to 320.
      ok: for each image whether its first line is right (green, ticked), wrong (red, crossed) or
        neither (None).

    Raises:
      ValueError: the numbers of images, titles and marks differ, or the images are not uint8 RGB.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"images have to be [N, H, W, 3] uint8, not {images.dtype} {list(images.shape)}"
        )
    marks = [None] * len(images) if ok is None else list(ok)
    if not len(images) == len(titles) == len(marks) or len(images) == 0:
        raise ValueError(
            f"{len(images)} images, {len(titles)} titles and {len(marks)} marks have to be as many"
            " and at least one"
        )
    pictures = [_resized(image, scale) for image in images]
    # Text needs some width to be legible, whatever the picture's.
    width = max(pictures[0].width, _SMALL_SIDE)
    texts = [_wrapped(title, mark, width) for title, mark in zip(titles, marks, strict=True)]

    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    text_height = max(len(text) for text in texts) * _line_height()
    card_width = width + 2 * _PADDING
    card_height = pictures[0].height + text_height + 3 * _PADDING
    size = (
        columns * (card_width + _MARGIN) + _MARGIN,
        rows * (card_height + _MARGIN) + _MARGIN,
    )
    sheet = Image.new("RGB", size, _SHEET_BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left = _MARGIN + (i % columns) * (card_width + _MARGIN)
        top = _MARGIN + (i // columns) * (card_height + _MARGIN)
        frame = (left, top, left + card_width - 1, top + card_height - 1)
        draw.rounded_rectangle(frame, radius=10, fill=_CARD, outline=_CARD_EDGE)
        sheet.paste(picture, (left + (card_width - picture.width) // 2, top + _PADDING))
        y = top + picture.height + 2 * _PADDING
        for line, colour, bold in text:
            draw.text((left + _PADDING, y), line, fill=colour, font=_font(bold))
            y += _line_height()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
    return path


def _curves(lines: Sequence[dict[str, float]]) -> dict[str, np.ndarray]:
    """Each key's points [N, 2] of (step, value), in order of steps."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key != "step":
                points.setdefault(key, []).append((line["step"], value))
    return {key: np.array(sorted(values), dtype=float) for key, values in points.items()}


def _panels(count: int, width: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, three in a row, `width` inches each."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    size = (width * columns, 3.3 * rows)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for empty in axes[count:]:
        empty.remove()
    for panel in axes[:count]:
        panel.set_xlabel("step", color=_QUIET)
        panel.grid(True, color=_GRID, linewidth=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(colors=_QUIET, labelsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(_GRID)
        panel.title.set_color(_INK)
    return figure, list(axes[:count])


def _plot_smoothed(panel: Axes, curve: np.ndarray, colour: str) -> None:
    """The raw points pale, their moving average on top, its last value in the corner."""
    steps, values = curve.T
    if len(steps) < 10:
        panel.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=4)
        return
    smoothed = smooth(values, width=max(1.0, 0.02 * len(steps)))
    panel.plot(steps, values, color=colour, alpha=0.25, linewidth=1.0)
    panel.plot(steps, smoothed, color=colour, linewidth=1.8)
    finite = smoothed[np.isfinite(smoothed)]
    if len(finite):
        style = {"ha": "right", "va": "top", "color": colour, "fontweight": "bold"}
        panel.annotate(f"{finite[-1]:.3g}", (1, 1), xycoords="axes fraction", **style)


def _plot_lines(panel: Axes, curves: dict[str, np.ndarray]) -> None:
    """A line a metric; the legend beside the panel lists them from the highest to the lowest."""
    for i, (name, curve) in enumerate(sorted(curves.items(), key=lambda item: -item[1][-1, 1])):
        colour = _COLOURS[i % len(_COLOURS)]
        style = ("-", "--", ":", "-.")[i // len(_COLOURS) % 4]
        marker = "o" if len(curve) < 30 else None
        panel.plot(*curve.T, style, color=colour, marker=marker, markersize=4, label=name)
    if len(curves) > 1:
        panel.legend(
            fontsize=8, frameon=False, labelcolor=_INK, loc="upper left", bbox_to_anchor=(1.0, 1.0)
        )


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path


def _resized(image: np.ndarray, scale: int | None) -> Image.Image:
    picture = Image.fromarray(image)
    if scale is None and picture.width > _LARGE_SIDE:
        height = round(picture.height * _LARGE_SIDE / picture.width)
        return picture.resize((_LARGE_SIDE, height), Image.Resampling.LANCZOS)
    scale = scale or max(1, _SMALL_SIDE // picture.width)
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, Image.Resampling.NEAREST)


@functools.cache
def _font(bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along, so that no font has to be installed."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / name, size=13)


def _line_height() -> int:
    return sum(_font(bold=True).getmetrics()) + 3


def _wrapped(title: str, mark: bool | None, width: int) -> list[tuple[str, str, bool]]:
    """Lines (text, colour, bold) of a title, none wider than `width` pixels."""
    lines = []
    for i, paragraph in enumerate(title.split("\n")):
        marked = i == 0 and mark is not None
        colour = (_RIGHT if mark else _WRONG) if marked else (_INK if i == 0 else _QUIET)
        sign = ("✓ " if mark else "✗ ") if marked else ""
        lines += [(line, colour, i == 0) for line in _fold(sign + paragraph, width, bold=i == 0)]
    return lines


def _fold(text: str, width: int, bold: bool) -> list[str]:
    """Break a text at spaces, and within a word only where it alone is too wide."""
    font = _font(bold)
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width:
            cut = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width)
            lines += [line] if line else []
            lines.append(word[:cut])
            line, word = "", word[cut:]
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
        else:
            lines.append(line)
            line = word
    return [*lines, line] if line or not lines else lines

"""Pictures: learning curves, a sheet of predictions, blocks and halos on a photograph."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Of a sheet: its width in inches, and how many characters of captions fit side by side. Names of
# classes are cut where they are longer, so that there are no less than four columns.
_SHEET_WIDTH, _SHEET_CHARACTERS, _LONGEST_NAME = 10.5, 150, 13


def learning_curves(rows: Sequence[dict[str, Any]], path: epath.PathLike) -> None:
    """Draws loss, error and learning rate over the steps as a PNG.

    Args:
      rows: of `halonet.metrics.read_metrics`.
      path: of the PNG, may be gs://.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, error, rate = figure.subplots(1, 3)
    for name, label, style in (
        ("train/loss", "training batches (smoothed labels)", {"linewidth": 0.8, "alpha": 0.8}),
        ("eval/loss", "held out", {"marker": "o", "markersize": 3}),
    ):
        loss.plot(*_series(rows, name), label=label, **style)
    for name, label, style in (
        ("train/top1", "training batches", {"linewidth": 0.8, "alpha": 0.8}),
        ("eval/top1", "held out", {"marker": "o", "markersize": 3}),
    ):
        steps, values = _series(rows, name)
        error.plot(steps, [100 * (1 - value) for value in values], label=label, **style)
    rate.plot(*_series(rows, "train/learning_rate"), color="tab:gray")
    loss.set(title="loss (nats)", xlabel="step", yscale="log")
    # Linear below one percent, so that a batch without a mistake can be drawn.
    error.set_yscale("symlog", linthresh=1.0)
    error.set(title="top-1 error (%)", xlabel="step", ylim=(0, 100))
    rate.set(title="learning rate", xlabel="step")
    for axis in (loss, error):
        axis.legend(frameon=False)
    for axis in (loss, error, rate):
        axis.grid(alpha=0.3)
    _save(figure, path)


def compared_curves(runs: Mapping[str, Sequence[dict[str, Any]]], path: epath.PathLike) -> None:
    """Draws the loss and the top-1 error of runs over the steps, in one plot each, as a PNG.

    Args:
      runs: of each, by its name, the rows of `halonet.metrics.read_metrics`.
      path: of the PNG, may be gs://.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    training, loss, error = figure.subplots(1, 3)
    for name, rows in runs.items():
        training.plot(*_series(rows, "train/loss"), label=name, linewidth=0.8)
        loss.plot(*_series(rows, "eval/loss"), label=name, marker="o", markersize=3)
        steps, top1 = _series(rows, "eval/top1")
        error.plot(steps, [100 * (1 - it) for it in top1], label=name, marker="o", markersize=3)
    training.set(title="loss of training batches (nats)", xlabel="step", yscale="log")
    loss.set(title="loss, held out (nats)", xlabel="step", yscale="log")
    error.set(title="top-1 error, held out (%)", xlabel="step")
    for axis in (training, loss, error):
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    _save(figure, path)


def prediction_sheet(
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    classes: Sequence[str],
    path: epath.PathLike,
    *,
    columns: int = 10,
    rows: int = 6,
) -> None:
    """Draws images with what the model says of them as a PNG, the mistakes first.

    Mistakes come by falling confidence in the wrong class, then the correct ones by rising
    confidence: the hardest first. Where the names of the classes need more room than a digit, there
    are fewer columns, and so larger images.

    Args:
      images: uint8 (N, H, W, 3).
      labels: int (N,).
      logits: float (N, len(classes)).
      path: of the PNG, may be gs://.
    """
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=-1, keepdims=True)
    predicted = logits.argmax(axis=-1)
    confidence = probabilities.max(axis=-1)
    wrong = predicted != labels
    names = [it if len(it) <= _LONGEST_NAME else f"{it[: _LONGEST_NAME - 1]}…" for it in classes]
    longest = max(len(f"{it} as {it}  100%") for it in names)
    columns = min(columns, _SHEET_CHARACTERS // longest)
    order = np.lexsort((np.where(wrong, -confidence, confidence), ~wrong))[: rows * columns]
    captions, colors = [], []
    for index in order:
        caption = f"{names[predicted[index]]}  {confidence[index]:.0%}"
        if wrong[index]:
            caption = f"{names[labels[index]]} as {caption}"
        captions.append(caption)
        colors.append("tab:red" if wrong[index] else "tab:green")
    title = f"{wrong.sum()} mistakes in {len(labels)}, first; then the least certain"
    sheet(images[order], captions, path, colors=colors, title=title, columns=columns)


def sheet(
    images: np.ndarray,
    captions: Sequence[str],
    path: epath.PathLike,
    *,
    colors: Sequence[str] = (),
    title: str = "",
    columns: int = 10,
) -> None:
    """Draws images in rows, a caption above each, as a PNG.

    Args:
      images: uint8 (N, H, W, 3).
      captions: N texts.
      path: of the PNG, may be gs://.
      colors: of the captions; black where there are none.
      title: above all.
    """
    rows = -(-len(images) // columns)
    # All in inches. One pair of axes for all: sixty of their own take ten times as long to lay out.
    across = _SHEET_WIDTH / columns
    side, down = 0.9 * across, 0.9 * across + 0.3
    height = rows * down + 0.4
    figure = Figure(figsize=(_SHEET_WIDTH, height))
    figure.suptitle(title, y=1 - 0.1 / height)
    axis = figure.add_axes((0, 0, 1, 1 - 0.4 / height))
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(place, columns)
        left, top = (column + 0.05) * across, row * down + 0.25
        axis.imshow(image, extent=(left, left + side, top + side, top), aspect="auto")
        color = colors[place] if colors else "black"
        axis.text(left + side / 2, top - 0.04, caption, fontsize=8, color=color, ha="center")
    axis.set(xlim=(0, _SHEET_WIDTH), ylim=(rows * down, 0))
    axis.axis("off")
    _save(figure, path)


def view_sheet(
    above: np.ndarray,
    below: np.ndarray,
    names: Sequence[str],
    path: epath.PathLike,
    *,
    columns: int = 8,
) -> None:
    """Draws images as training sees them, and below each what evaluation sees of it, as a PNG.

    Args:
      above: uint8 (N, H, W, 3): as training sees them.
      below: uint8 (N, H, W, 3): as evaluation sees them.
      names: N class names.
      path: of the PNG, may be gs://.
    """
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(4.0, columns * 1.4), rows * 3.1 + 0.4), layout="constrained")
    height, width = above.shape[1:3]
    figure.suptitle(f"training above, evaluation below; {height} × {width} px", fontsize=10)
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for index, name in enumerate(names):
        row, column = divmod(index, columns)
        grid[2 * row, column].imshow(above[index])
        grid[2 * row, column].set_title(name, fontsize=8)
        grid[2 * row + 1, column].imshow(below[index])
    _save(figure, path)


def reliability(bins: Mapping[str, Mapping[str, Sequence[float]]], path: epath.PathLike) -> None:
    """Draws how often the model is right against how sure it is, as a PNG: a panel for each set.

    Args:
      bins: of each set, by its name, equal ranges of confidence from 0 to 1: "count", "top1" and
        "confidence" as `halonet.evaluate.score` gives them.
      path: of the PNG, may be gs://.

    Source: Guo et al., 2017, arXiv 1706.04599, figure 1.
    """
    figure = Figure(figsize=(3.8 * len(bins), 4.2), layout="constrained")
    panels = figure.subplots(1, len(bins), squeeze=False)[0]
    for axis, (name, its) in zip(panels, bins.items(), strict=True):
        count, top1 = np.array(its["count"]), np.array(its["top1"])
        gap = np.array(its["confidence"]) - top1
        width, total = 1 / len(count), count.sum()
        left = np.arange(len(count)) * width
        axis.bar(left, top1, width, align="edge", edgecolor="white", label="accuracy")
        # From the accuracy to the confidence; an empty bin has neither.
        style = {"color": "tab:red", "alpha": 0.35, "label": "confidence beyond or short of it"}
        axis.bar(left, gap, width, bottom=top1, align="edge", **style)
        axis.plot((0, 1), (0, 1), color="0.4", linestyle="--", linewidth=1)
        shares = axis.twinx()
        shares.step([*left, 1], [*(count / total), count[-1] / total], where="post", color="0.2")
        shares.set(ylim=(0, 1), ylabel="share of the examples (line)")
        error = float(count @ np.abs(gap)) / total
        axis.set(title=f"{name}\ncalibration error {error:.2%}", xlabel="confidence")
        axis.set(xlim=(0, 1), ylim=(0, 1), ylabel="top-1 accuracy (bars)")
    panels[0].legend(frameon=False, loc="upper left", fontsize=8)
    _save(figure, path)


def heat_maps(
    maps: Mapping[str, np.ndarray],
    path: epath.PathLike,
    *,
    image: np.ndarray | None = None,
    at: tuple[float, float] | None = None,
    columns: int = 4,
    signed: bool = False,
) -> None:
    """Draws matrices as colours, each in its own scale, as a PNG; over an image where one is given.

    Args:
      maps: by their titles: (h, w) each.
      path: of the PNG, may be gs://.
      image: uint8 (H, W, 3), which every map covers whole.
      at: row and column of a ring, in pixels of the image, or else of the maps.
      columns: panels side by side.
      signed: whether red and blue tell signs, around white; else from 0 on.
    """
    columns = min(columns, len(maps))
    rows = -(-len(maps) // columns)
    height, width = next(iter(maps.values())).shape if image is None else image.shape[:2]
    tall = np.clip(2.7 * height / width, 1.0, 4.5) + 0.4
    figure = Figure(figsize=(2.7 * columns, tall * rows), layout="compressed")
    for axis in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axis.axis("off")
    for axis, (title, values) in zip(grid.flat, maps.items(), strict=False):
        values = np.asarray(values, np.float32)
        extent = (0, values.shape[1], values.shape[0], 0)
        if image is not None:
            extent = (0, width, height, 0)
            gray = image @ np.array([0.299, 0.587, 0.114])
            axis.imshow(gray, cmap="gray", vmin=-128, vmax=255, extent=extent)
        most = float(np.abs(values).max()) or 1.0
        style = {"cmap": "RdBu_r", "vmin": -most} if signed else {"cmap": "magma", "vmin": 0}
        # Over an image what is 0 is not seen: the more, the less of the image.
        alpha = None if image is None else np.sqrt(np.abs(values) / most)
        axis.imshow(values, vmax=most, alpha=alpha, extent=extent, interpolation="nearest", **style)
        if at is not None:
            axis.scatter(at[1], at[0], s=60, facecolor="none", edgecolor="tab:cyan", linewidth=1.5)
        axis.set_title(title, fontsize=9)
    _save(figure, path)


def photograph(height: int, width: int) -> np.ndarray:
    """Returns a real photograph, cropped and resized: uint8 (height, width, 3)."""
    # Here and not above: a run draws other pictures, and scikit-learn takes a second to import.
    from PIL import Image
    from sklearn.datasets import load_sample_image

    pixels = load_sample_image("china.jpg")
    full_height, full_width, _ = pixels.shape
    rows = min(full_height, full_width * height // width)
    columns = min(full_width, full_height * width // height)
    top = (full_height - rows) // 2
    # The pavilion stands left of the middle.
    left = min(max(240 - columns // 2, 0), full_width - columns)
    cropped = Image.fromarray(pixels[top : top + rows, left : left + columns])
    return np.asarray(cropped.resize((width, height), Image.Resampling.LANCZOS))


def halo_picture(
    layers: Sequence[tuple[np.ndarray, int, tuple[int, int]]],
    path: epath.PathLike,
    *,
    block: int,
    halo: int,
    border: str = "zeros",
    title: str = "",
) -> None:
    """Draws blocks, halos and what a query sees as a PNG: a whole map, then layers in close-up.

    Args:
      layers: of each one the map of its keys, uint8 (H, W, 3); its stride (queries are every such
        pixel); and the row and column of a query, counted in queries. The whole map is that of the
        first layer.
      path: of the PNG, may be gs://.
      block, halo: in pixels of the maps, which need not be whole blocks.
      border: "zeros" or "mask": what the caption says of a window that reaches out of the map.
      title: above the whole map.
    """
    figure = Figure(figsize=(4.5 * (len(layers) + 1), 5.0), layout="compressed")
    whole, *close_ups = figure.subplots(1, len(layers) + 1)

    pixels, stride, query = layers[0]
    height, width, _ = pixels.shape
    _draw_window(whole, pixels, block, halo, (stride * query[0], stride * query[1]))
    bottom, right = (-(-size // block) * block for size in (height, width))
    # Square like the others, or they would shrink to its height.
    reach = 0.52 * max(bottom, right)
    whole.set_xlim(right / 2 - reach, right / 2 + reach)
    whole.set_ylim(bottom / 2 + reach, bottom / 2 - reach)
    caption = f"A map of {height} × {width} pixels in blocks of {block} × {block}"
    whole.set_title(f"{title}\n{caption}".strip(), fontsize=10)

    side = block + 2 * halo
    for axis, (pixels, stride, query) in zip(close_ups, layers, strict=True):
        height, width, _ = pixels.shape
        row, column = stride * query[0], stride * query[1]
        rows, columns = _draw_window(axis, pixels, block, halo, (row, column))
        shade = np.zeros((height, width, 4))
        shade[..., 3] = 0.6
        shade[rows, columns, 3] = 0
        axis.imshow(shade, extent=(0, width, height, 0))
        top, left = row // block * block, column // block * block
        x, y = np.meshgrid(
            np.arange(left, min(left + block, width), stride) + 0.5,
            np.arange(top, min(top + block, height), stride) + 0.5,
        )
        axis.scatter(x, y, s=16, color="tab:red", edgecolor="white", linewidth=0.4, zorder=4)
        # With half a block of what is not seen around it.
        axis.set_xlim(left - halo - block / 2, left + block + halo + block / 2)
        axis.set_ylim(top + block + halo + block / 2, top - halo - block / 2)

        caption = "A block and its window:"
        if stride > 1:
            caption = f"Downsampling, from a map of {height} × {width}:"
        queries = f"{x.shape[0]} × {x.shape[1]} queries (red)"
        caption += f"\n{queries} share {side} × {side} keys (gold)"
        inside = (rows.stop - rows.start, columns.stop - columns.start)
        if inside != (side, side):
            rest = {"zeros": "the others are zeros", "mask": "the others have no weight"}[border]
            caption += f",\n{inside[0]} × {inside[1]} of them in the image; {rest}"
        axis.set_title(caption, fontsize=10)
    _save(figure, path)


def _draw_window(
    axis: Axes, pixels: np.ndarray, block: int, halo: int, at: tuple[int, int]
) -> tuple[slice, slice]:
    """Draws a map in blocks, the window of the query at a pixel, and returns that window."""
    height, width, _ = pixels.shape
    axis.set(xticks=[], yticks=[], facecolor="0.85")
    axis.imshow(pixels, extent=(0, width, height, 0))
    bottom, right = (-(-size // block) * block for size in (height, width))
    grid = {"color": "white", "linewidth": 0.8}
    axis.hlines(range(0, bottom + 1, block), 0, right, **grid)
    axis.vlines(range(0, right + 1, block), 0, bottom, **grid)

    top, left = at[0] // block * block, at[1] // block * block
    # The image cuts the window; where blocks are padded, also before the last block ends.
    rows = slice(max(top - halo, 0), min(top + block + halo, height))
    columns = slice(max(left - halo, 0), min(left + block + halo, width))

    def outline(y: int, x: int, height: int, width: int, **style) -> None:
        axis.add_patch(
            Rectangle((x, y), width, height, fill=False, linewidth=2.2, zorder=3, **style)
        )

    side = block + 2 * halo
    seen = (rows.stop - rows.start, columns.stop - columns.start)
    if seen != (side, side):
        outline(top - halo, left - halo, side, side, edgecolor="gold", linestyle=":")
    outline(top, left, block, block, edgecolor="tab:red")
    outline(rows.start, columns.start, *seen, edgecolor="gold", label="window")
    star = {"marker": "*", "color": "tab:red", "edgecolor": "white", "zorder": 5}
    axis.scatter(at[1] + 0.5, at[0] + 0.5, s=130, linewidth=1, **star)
    return rows, columns


def _series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def _save(figure: Figure, path: epath.PathLike) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    epath.Path(path).write_bytes(buffer.getvalue())

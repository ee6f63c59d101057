"""Pictures of a run: learning curves, and a sheet of images with predictions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure


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
    confidence: the hardest first.

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
    order = np.lexsort((np.where(wrong, -confidence, confidence), ~wrong))[: rows * columns]
    rows = -(-len(order) // columns)

    figure = Figure(figsize=(columns * 1.05, rows * 1.3 + 0.5), layout="constrained")
    figure.suptitle(f"{wrong.sum()} mistakes in {len(labels)}, first; then the least certain")
    for axis in figure.subplots(rows, columns, squeeze=False).flat:
        axis.axis("off")
    for axis, index in zip(figure.axes, order, strict=False):
        axis.imshow(images[index])
        title = f"{classes[predicted[index]]}  {confidence[index]:.0%}"
        if wrong[index]:
            title = f"{classes[labels[index]]} as {title}"
        axis.set_title(title, fontsize=8, color="tab:red" if wrong[index] else "tab:green")
    _save(figure, path)


def _series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def _save(figure: Figure, path: epath.PathLike) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    epath.Path(path).write_bytes(buffer.getvalue())

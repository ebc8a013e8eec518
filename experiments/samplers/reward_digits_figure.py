"""The picture, the numbers and the claims of ``reward_digits``."""

from typing import Any

import numpy as np

from experiments._framework import evidence
from experiments._framework.experiment import Claim
from experiments._framework.results import Record, Summary
from unrollgrad.running import need

ONE, FIVE = "adjoint matching, scale 1", "adjoint matching, scale 5"
STYLES = {
    "DRaFT": ("C0", "o"),
    "DRaFT-1": ("C2", "^"),
    "ES": ("C7", "D"),
    ONE: ("C3", "d"),
    FIVE: ("darkred", "H"),
    "DRaFT, smooth": ("C9", "s"),
    "ES, zlib": ("C1", "P"),
}
"""The colour and the marker of each run."""
ASKED = ("DRaFT", "DRaFT-1", "ES", ONE, FIVE)
"""The runs whose reward is the judge's log probability of an eight."""
OTHERS = ("DRaFT, smooth", "ES, zlib")
REFERENCES = {"data": "s", "data, eights": "*", "untrained": "o"}

Table = dict[tuple[str, str], np.ndarray]


def table(records: list[Record]) -> Table:
    """Numbers by (run, metric), without the pixels: an array of shape (seeds, points)."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for r in records:
        if r.metric != "pixel":
            runs = found.setdefault((r.labels["estimator"], r.metric), {})
            runs.setdefault(r.seed, []).append(r.value)
    out = {}
    for key, runs in found.items():
        length = min(map(len, runs.values()))  # an interrupted run has fewer
        out[key] = np.array([values[:length] for values in runs.values()])
    return out


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Samples of every run above; hacking, variety and the other rewards below."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(13, 11), layout="constrained")
    rows = _images(records)
    above, below = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    if rows:
        _draw_images(above, rows)
    found = table(records)
    left, middle, right = below.subplots(1, 3)
    left.plot([0, 1], [0, 1], ":", color="black", lw=1)
    for name in ASKED:
        _path(left, found, name, "judge", "held_out")
        _path(middle, found, name, "held_out", "diversity")
    for name in OTHERS:
        _path(right, found, name, "bytes", "nearest")
    for name, marker in REFERENCES.items():
        for axis, x, y in (
            (left, "judge", "held_out"),
            (middle, "held_out", "diversity"),
            (right, "bytes", "nearest"),
        ):
            if (name, x) in found:
                at = [found[name, metric].mean() for metric in (x, y)]
                axis.plot(*at, marker, color="black", ms=8, ls="", label=name)
    left.set(xlabel="probability of an eight: the judge", ylabel="a held-out classifier")
    left.set_title("below the dotted line: hacking")
    middle.set(xlabel="probability of an eight: held-out", ylabel="mean distance of two samples")
    middle.set_title("variety")
    right.set(xlabel="bytes after zlib", ylabel="distance to the nearest real image")
    right.set_title("smoothness and size as rewards")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def _images(records: list[Record]) -> dict[str, np.ndarray]:
    """The first seed's images, shape (images, 8, 8), by run."""
    found: dict[str, list[float]] = {}
    for r in records:
        if r.metric == "pixel":
            found.setdefault(r.labels["estimator"], []).append(r.value)
    return {
        name: np.array(x[: len(x) // 64 * 64]).reshape(-1, 8, 8)
        for name, x in found.items()
        if len(x) >= 64
    }


def _draw_images(figure: Any, rows: dict[str, np.ndarray]) -> None:
    """Two runs side by side in a line."""
    most = max(len(images) for images in rows.values())
    grid = figure.subplots(-(-len(rows) // 2), 2, squeeze=False)
    for axis in grid.flat[len(rows) :]:
        axis.remove()
    for axis, (name, images) in zip(grid.flat, rows.items(), strict=False):
        frame = np.full((10, 10 * most), np.nan)
        for i, image in enumerate(images):
            frame[1:9, 10 * i + 1 : 10 * i + 9] = image
        axis.imshow(frame, cmap="gray", vmin=-1, vmax=1)
        axis.set_title(name, fontsize=9, pad=2)
        axis.axis("off")


def _path(axis: Any, found: Table, name: str, x: str, y: str) -> None:
    if (name, x) in found:
        color, marker = STYLES[name]
        at, over = (found[name, metric].mean(0) for metric in (x, y))
        axis.plot(at, over, color=color, marker=marker, ms=5, lw=1.2, label=name)


def show(records: list[Record]) -> None:
    """Prints the measures at the end of every run, and of the references."""
    found = table(records)
    metrics = ("judge", "held_out", "diversity", "nearest", "variation", "bytes")
    print(f"{'':>22}" + "".join(f"{metric:>16}" for metric in metrics))
    for name in dict.fromkeys(name for name, _ in found):
        cells = []
        for metric in metrics:
            last = found[name, metric][:, -1]
            error = np.std(last, ddof=1) / len(last) ** 0.5 if len(last) > 1 else None
            cells.append(f"{last.mean():.3f}" + (f" ± {error:.3f}" if error is not None else ""))
        print(f"{name:>22}" + "".join(f"{cell:>16}" for cell in cells))


HACKING = "Clark et al. 2024; Prabhudesai et al. 2023"
ADJOINT = "Domingo-Enrich et al. 2025"


def claims(summary: Summary) -> list[Claim]:
    """Hacking, variety, the adjoint's scale, and a reward without a gradient."""

    def end(name, metric):
        return summary.find(metric, estimator=name)

    table = (
        (
            "DRaFT pleases the judge more than the held-out classifier",
            HACKING,
            evidence.less(end("DRaFT", "held_out"), end("DRaFT", "judge")),
        ),
        (
            "DRaFT ends with less than half of the untrained model's variety",
            HACKING,
            evidence.less(end("DRaFT", "diversity"), end("untrained", "diversity"), 0.5),
        ),
        (
            "adjoint matching with scale 1 keeps more variety than DRaFT",
            ADJOINT,
            evidence.more(end(ONE, "diversity"), end("DRaFT", "diversity")),
        ),
        (
            "its samples are nearer to real images than DRaFT's",
            ADJOINT,
            evidence.less(end(ONE, "nearest"), end("DRaFT", "nearest")),
        ),
        (
            "a larger scale trades variety for reward: less variety with 5 than with 1",
            ADJOINT,
            evidence.less(
                end(FIVE, "diversity"),
                end(ONE, "diversity"),
            ),
        ),
        (
            "the held-out classifier sees more eights after adjoint matching with scale 1 than in "
            "the untrained model's samples",
            ADJOINT,
            evidence.more(end(ONE, "held_out"), end("untrained", "held_out")),
        ),
        (
            "evolution strategies shrink the bytes after zlib, which have no gradient",
            "theory: ES needs values only",
            evidence.less(end("ES, zlib", "bytes"), end("untrained", "bytes")),
        ),
        (
            "a reward for smoothness alone leaves the digits behind: farther from real images than "
            "the untrained model",
            HACKING,
            evidence.more(end("DRaFT, smooth", "nearest"), end("untrained", "nearest")),
        ),
    )
    return [Claim(says, source, found.text, found.holds) for says, source, found in table]

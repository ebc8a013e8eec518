"""The definition of an experiment, and how it runs: seeds, files, interruptions."""

import contextlib
import dataclasses
import functools
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments._framework import results
from experiments._framework.commands import as_json, command_line
from experiments._framework.processes import from_process_0
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings, ResumableSettings
from unrollgrad import running
from unrollgrad.running import progress_bar, stop_requests

MOST_BYTES = 100_000
"""Largest size of a picture; a clone of the repository downloads the pictures of all records."""

SCALES = ("smoke", "cpu", "paper")
"""smoke: seconds, for tests. cpu: minutes on two cores. paper: as published, on accelerators."""


Write = Callable[[dict[str, Any]], None]
Progress = Callable[[str, float], None]


class Claim(NamedTuple):
    """A claim of a paper or of the theory, and our result.

    Attributes:
        says: The claim.
        source: The paper or the theory that makes the claim.
        ours: Our measurement, with its standard error.
        holds: Whether our measurement agrees; None if this run cannot tell.
    """

    says: str
    source: str
    ours: str
    holds: bool | None


class Experiment(NamedTuple):
    """An experiment that reproduces one figure or table.

    Attributes:
        name: The name on the command line.
        about: The description in one line.
        settings: A frozen dataclass, a subclass of ``CommonSettings``.
        scales: Settings by scale: "smoke", "cpu", "paper".
        labels: Columns that tell the series in ``metrics.csv`` apart, besides seed and step.
        run: ``run(settings, seed, folder, write, progress)`` calls ``write(numbers)`` as soon as
            numbers are computed (a dict of the labels, optionally ``step``, and numbers by metric),
            and ``progress(text, fraction)`` in between. It may keep files in ``folder``; a resumed
            run finds them there again.
        draw: ``draw(records, config)`` returns a matplotlib figure; it needs the CSV alone.
        show: ``show(records)`` prints the result.
        claims: ``claims(summary)`` compares a recorded result with the papers' claims.
        would_change: What would change our mind, in one sentence: the result, on which larger
            problem and with which power, that would overturn the verdict.
        fill: ``fill(settings)`` replaces None by defaults that depend on other settings.
        title: ``title(settings)`` is the name of the results' folder. Default: ``name``.
    """

    name: str
    about: str
    settings: type
    scales: dict[str, Any]
    labels: tuple[str, ...]
    run: Callable[[Any, int, Path, Write, Progress], None]
    draw: Callable[[list[Record], dict[str, Any]], Any]
    show: Callable[[list[Record]], None]
    claims: Callable[[Summary], list[Claim]]
    would_change: str
    fill: Callable[[Any], Any] = lambda settings: settings
    title: Callable[[Any], str] | None = None


def execute(experiment: Experiment, settings: CommonSettings) -> Path | None:
    """Runs all seeds and leaves everything in a new folder, also when a run fails.

    The folder holds ``config.json``, ``metrics.csv`` (written during the run), ``summary.json`` and
    ``figure.png``. A run that is interrupted or fails keeps what was computed, and its summary says
    so; one that is interrupted also prints it. With ``settings.resume`` the run continues in its
    old folder, and lines that are there already are not written again. If there are several
    processes, all of them compute, but only
    process 0 writes and prints; the others return None.

    Raises:
        ValueError: If there are no seeds, a seed is given twice, or nothing was computed.
        OSError: If the folder cannot be made.
    """
    command = command_line(experiment, settings)
    settings = experiment.fill(settings)
    seeds = tuple(settings.seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` must be different numbers, at least one; got {seeds}.")
    if jax.process_index() > 0:
        folder = Path(from_process_0(""))
        for seed in seeds:
            experiment.run(settings, seed, folder, lambda numbers: None, lambda text, done: None)
        return None
    title = experiment.title(settings) if experiment.title else experiment.name
    folder = _resumed(settings) or results.new_folder(settings.out, title)
    with contextlib.ExitStack() as stack:
        if isinstance(settings, ResumableSettings):  # before anything is written into the folder
            stack.enter_context(running.lock(folder / "checkpoints"))
        return _run(experiment, settings, Path(from_process_0(str(folder))), command)


def _resumed(settings: CommonSettings) -> Path | None:
    """The folder of the run to resume, if there is one."""
    return settings.resume if isinstance(settings, ResumableSettings) else None


def _run(experiment: Experiment, settings: CommonSettings, folder: Path, command: str) -> Path:
    begun, compiled = time.perf_counter(), results.compile_seconds()
    revision = results.resumed_revision(folder)
    config = {"experiment": experiment.name, **dataclasses.asdict(settings)}
    written = {k: as_json(v) for k, v in config.items() if k != "resume"}
    results.write_json(folder / "config.json", written)
    status, goes_on = "complete", isinstance(settings, ResumableSettings)
    try:
        _run_seeds(experiment, settings, folder)
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}"
        goes_on = goes_on and not isinstance(error, ArithmeticError)  # it would fail again
        raise
    finally:
        seconds = time.perf_counter() - begun
        compiling = results.compile_seconds() - compiled
        records = results.read(folder)
        if records:
            outcome = results.Outcome(status, seconds, compiling, revision, command)
            results.write_summary(folder, config, records, outcome)
            redraw(experiment, folder)
            if status == "interrupted":
                # An early interruption may leave less than the last line of a table needs.
                with contextlib.suppress(LookupError, ValueError, StopIteration):
                    experiment.show(records)
            if status != "complete":
                print(f"what was computed is in {folder}", file=sys.stderr)
                if goes_on:
                    again = f"python -m experiments {experiment.name} --resume {folder}"
                    print(f"to go on: {again}", file=sys.stderr)
        elif _resumed(settings) is None:
            results.remove(folder)  # nothing was computed
    if not records:
        raise ValueError("nothing was computed: the settings leave nothing to do.")
    experiment.show(records)
    print(f"{seconds:.0f} s; table and picture are in {folder}")
    return folder


def _run_seeds(experiment: Experiment, settings: CommonSettings, folder: Path) -> None:
    """Runs one seed after another and writes their numbers; a signal ends it between steps."""
    seeds = settings.seeds
    with (
        results.writer(folder, experiment.labels) as write,
        progress_bar(1.0) as progress,
        stop_requests() as stop,
    ):
        for i, seed in enumerate(seeds):

            def report(text: str, fraction: float, i: int = i) -> None:
                progress(text, (i + fraction) / len(seeds))
                if stop:
                    raise KeyboardInterrupt

            experiment.run(settings, seed, folder, functools.partial(write, seed), report)
            if stop and i + 1 < len(seeds):
                raise KeyboardInterrupt


def redraw(experiment: Experiment, folder: Path) -> Path:
    """Draws ``figure.png`` from the folder's CSV."""
    figure = experiment.draw(results.read(folder), results.read_json(folder / "config.json"))
    path = folder / "figure.png"
    path.write_bytes(small_picture(figure))
    return path


def small_picture(figure: Any) -> bytes:
    """A PNG in its 256 most frequent colours, at a lower resolution if it would be too large.

    A palette that averages colours instead would give lines over a heat map a common colour.
    """
    from PIL import Image

    picture = b""
    for dpi in (150, 120, 100, 80):
        full, small = io.BytesIO(), io.BytesIO()
        figure.savefig(full, dpi=dpi)
        index, palette = _few_colors(np.asarray(Image.open(full).convert("RGB")))
        few = Image.fromarray(index)
        few.putpalette(palette.ravel().tolist())
        few.save(small, "png", optimize=True)
        picture = small.getvalue()
        if len(picture) <= MOST_BYTES:
            break
    return picture


def _few_colors(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel's index among the 256 most frequent colours, or the nearest, and the colours."""
    packed = pixels.astype(np.uint32) @ np.array([2**16, 2**8, 1], np.uint32)
    found, place, counts = np.unique(packed.ravel(), return_inverse=True, return_counts=True)
    colors = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=-1).astype(np.int32)
    palette = colors[np.argsort(-counts, kind="stable")[:256]]
    distances = sum(np.square(colors[:, None, i] - palette[:, i]) for i in range(3))
    nearest = np.argmin(distances, axis=1).astype(np.uint8)
    return nearest[place].reshape(packed.shape), palette.astype(np.uint8)

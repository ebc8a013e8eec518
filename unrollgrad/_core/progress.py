"""A progress bar on a terminal, or a line in a notebook."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from unrollgrad._core import optional_packages

_shown: list[object] = []


@contextlib.contextmanager
def progress_bar(total: float, unit: str = "") -> Iterator[Callable[[str, float], None]]:
    """Yields ``progress(text, done)``, which shows a text and the part of ``total`` that is done.

    With a ``unit`` its parts take equally long, and it shows the rate and the remaining time;
    without, they may not (some are compiled, some are not), and it shows the elapsed time alone.
    In a Jupyter notebook it is a line that goes away at the end. Without rich, if standard error is
    neither, and inside another bar it shows nothing.
    """
    if not _shown and _in_notebook():
        with _line(total) as progress:
            yield progress
        return
    rich: Any = None
    if not _shown and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            rich = optional_packages.need("rich.progress", "rich")
    if rich is None:
        yield lambda text, done: None
        return
    columns = [
        rich.TextColumn("{task.description:>24}"),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[rate]}"),
        rich.TimeElapsedColumn(),
    ]
    if unit:
        columns.append(rich.TimeRemainingColumn())
    console = optional_packages.need("rich.console", "rich").Console(stderr=True)
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=total, rate="")

        def progress(text: str, done: float) -> None:
            bar.update(task, description=text, completed=done)
            speed = bar.tasks[0].speed
            if unit and speed:
                bar.update(task, rate=f"{speed:.3g} {unit}/s")

        _shown.append(bar)
        try:
            yield progress
        finally:
            _shown.pop()


def shown() -> bool:
    """Whether a bar is shown now."""
    return bool(_shown)


def _in_notebook() -> bool:
    module = sys.modules.get("IPython")
    shell = None if module is None else module.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


@contextlib.contextmanager
def _line(total: float) -> Iterator[Callable[[str, float], None]]:
    """A line of output in a notebook; the same text is overwritten at most twice a second."""
    display: Any = sys.modules["IPython"].display
    handle = display.display(display.HTML("compiling"), display_id=True)
    last, before = 0.0, ""

    def progress(text: str, done: float) -> None:
        nonlocal last, before
        told, _, _ = text.partition(" ")
        if told != before or time.monotonic() - last > 0.5:
            last, before = time.monotonic(), told
            handle.update(display.HTML(f"{text}: {done / total:.0%}"))

    _shown.append(handle)
    try:
        yield progress
    finally:
        _shown.pop()
        handle.update(display.HTML(""))

"""A progress bar on a terminal, nothing elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from unrollgrad._core import optional_packages

_shown: list[Any] = []


@contextlib.contextmanager
def progress_bar(total: float, unit: str = "") -> Iterator[Callable[[str, float], None]]:
    """Yields ``progress(text, done)``: what is being done, and how much of ``total`` is.

    With a ``unit`` it shows how many there are per second. Without rich, where standard error is no
    terminal, and inside another bar it shows nothing.
    """
    if _shown or not sys.stderr.isatty():
        yield lambda text, done: None
        return
    try:
        rich: Any = optional_packages.need("rich.progress", "rich")
    except ImportError:
        yield lambda text, done: None
        return
    columns = [
        rich.TextColumn("{task.description:>24}"),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[rate]}"),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    ]
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

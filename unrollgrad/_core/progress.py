"""A progress bar on a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from unrollgrad._core import optional_packages

_shown: list[object] = []


@contextlib.contextmanager
def progress_bar(total: float, unit: str = "") -> Iterator[Callable[[str, float], None]]:
    """Yields ``progress(text, done)``, which shows a text and the part of ``total`` that is done.

    With a ``unit`` it shows the rate per second. Without rich, if standard error is not a terminal,
    and inside another bar it shows nothing.
    """
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

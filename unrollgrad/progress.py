"""A progress bar on a terminal, nothing elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from unrollgrad import extras


@contextlib.contextmanager
def progress_bar(total: float, unit: str = "") -> Iterator[Callable[[str, float], None]]:
    """Yields ``progress(text, done)``: what is being done, and how much of ``total`` is.

    Without rich, or where standard error is no terminal, it shows nothing.
    """
    if not sys.stderr.isatty():
        yield lambda text, done: None
        return
    try:
        rich: Any = extras.need("rich.progress", "rich")
    except ImportError:
        yield lambda text, done: None
        return
    columns = [
        rich.TextColumn("{task.description:>24}"),
        rich.BarColumn(),
        rich.TaskProgressColumn(show_speed=bool(unit)),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    ]
    bar = rich.Progress(*columns, console=extras.need("rich.console", "rich").Console(stderr=True))
    task = bar.add_task("compiling", total=total)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(extras.need("rich.errors", "rich").LiveError):
            stack.enter_context(bar)  # another bar may be shown already, of which there can be one
        yield lambda text, done: bar.update(task, description=text, completed=done)

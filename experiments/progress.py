"""A progress bar on a terminal, nothing elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def bar() -> Iterator[Callable[[str, float], None]]:
    """Yields ``progress(text, fraction)``: what is being done, and how much of the whole is."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>24}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=1.0)
        yield lambda text, fraction: progress.update(task, description=text, completed=fraction)

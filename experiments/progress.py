"""A progress bar on a terminal, nothing elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def bars(total: int) -> Iterator[Callable[[str, int, int], None]]:
    """Yields ``report(name, done, of)``: one bar over ``total`` names, labelled with the current.

    Args:
        total: How many names will be reported.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=total)
        finished: list[str] = []

        def report(name: str, done: int, of: int) -> None:
            if not finished or finished[-1] != name:
                finished.append(name)
            completed = len(finished) - 1 + done / of
            progress.update(task, description=name, completed=completed)

        yield report

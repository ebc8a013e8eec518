"""Tables and figures as every diagnosis prints and draws them."""

import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unrollgrad._core import optional_packages

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def print_table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> None:
    """Prints a table, and below it what it means; the first column and words are to the left.

    Needs rich (``pip install "unrollgrad[experiments]"``).
    """
    console = optional_packages.console()
    console.width = min(console.width, 100)
    table = optional_packages.need("rich.table", "rich").Table(
        box=optional_packages.need("rich.box", "rich").SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title=title,
        title_justify="left",
    )
    for i, heading in enumerate(headings):
        words = all(" " in row[i] for row in rows)
        table.add_column(heading, justify="left" if i == 0 or words else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)


def readable_bytes(number: float) -> str:
    """The number with its unit, from bytes to GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"


def figure(width: float, height: float) -> "Figure":
    """An empty figure that a notebook shows. Needs matplotlib."""
    module = optional_packages.need("matplotlib.figure", "matplotlib")
    made = module.Figure(figsize=(width, height), layout="constrained")
    made._repr_png_ = functools.partial(_png, made)
    return made


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    return buffer.getvalue()

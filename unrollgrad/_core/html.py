"""Short tables for notebooks. They set no colours, so that they suit dark and light pages."""

import html
from collections.abc import Iterable, Sequence


def table(
    rows: Iterable[Sequence[object]],
    head: Sequence[tuple[str, str]] = (),
    caption: str = "",
) -> str:
    """An HTML table; all texts are escaped.

    Args:
        rows: The cells, line by line; the first cell of a line names it.
        head: The headings, each with an explanation that is shown while the pointer is on it.
        caption: A line above the table.
    """
    top = f"<caption>{_text(caption)}</caption>" if caption else ""
    if head:
        cells = (f'<th title="{_text(about)}">{_text(name)}</th>' for name, about in head)
        top += f"<thead><tr>{''.join(cells)}</tr></thead>"
    lines = "".join(_line(row) for row in rows)
    return f"<table>{top}<tbody>{lines}</tbody></table>"


def _line(row: Sequence[object]) -> str:
    first, *others = map(_text, row)
    cells = "".join(f"<td>{text}</td>" for text in others)
    return f'<tr><th scope="row" style="text-align: left">{first}</th>{cells}</tr>'


def _text(text: object) -> str:
    return html.escape(str(text))

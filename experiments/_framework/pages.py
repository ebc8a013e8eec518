"""Numbers and tables in Markdown pages, put there by ``report`` between markers.

A marker names a function of ``tables.py`` and its arguments::

    accuracy <!-- report: number distillation accuracy series=CG decimals=3 -->0.920<!-- end -->

What is between ``-->`` and ``<!-- end -->`` is written by the script. A table's markers begin a
line, those of a number do not: in Markdown a comment at the beginning of a line ends the paragraph.
"""

import re
import shlex
from pathlib import Path

from experiments._framework.tables import FUNCTIONS, Records

MARKED = re.compile(r"(<!-- report: (.+?) -->)(.*?)(<!-- end -->)", re.DOTALL)


def files(given: tuple[Path, ...]) -> list[Path]:
    """The Markdown files among files and folders."""
    return [
        page for path in given for page in (sorted(path.glob("*.md")) if path.is_dir() else [path])
    ]


def filled(text: str, records: Records) -> str:
    """A page's text with what the markers ask for.

    Args:
        text: The page.
        records: All recorded runs.

    Raises:
        ValueError: If a marker cannot be understood; the message quotes it.
    """
    if text.count("<!-- report:") != len(MARKED.findall(text)):
        raise ValueError("a marker `<!-- report: ... -->` has no `<!-- end -->`: add it.")

    def fill(match: re.Match[str]) -> str:
        begin, words, _, end = match.groups()
        try:
            content = _call(words, records)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ValueError(f"the marker `{words}` cannot be filled: {error}") from error
        line = "\n" if "\n" in content else ""
        if bool(line) != (text[: match.start()][-1:] in ("", "\n")):
            raise ValueError(f"the marker `{words}` must {'' if line else 'not '}begin a line.")
        return f"{begin}{line}{content}{line}{end}"

    return MARKED.sub(fill, text)


def without_markers(text: str) -> str:
    """A page without what a script wrote, and without the markers."""
    return MARKED.sub("", text)


def _call(words: str, records: Records) -> str:
    name, *arguments = shlex.split(words)
    if name not in FUNCTIONS:
        raise ValueError(f"there is no function {name!r}, but {', '.join(FUNCTIONS)}.")
    given = [argument for argument in arguments if "=" not in argument]
    keywords = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    return FUNCTIONS[name](records, *given, **keywords)

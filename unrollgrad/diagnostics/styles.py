"""One colour, marker and line for each estimator, the same in every picture."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["DASHED", "OTHERS", "STYLES", "Style", "styles"]

DASHED = ("tbptt", "bptt", "truncated_es", "uoro", "dodge", "forward_mode")
"""Estimators that pictures draw with a dashed line, to tell them from their neighbours."""

STYLES = {
    "es_single": ("C0", "o"),
    "pes": ("C1", "s"),
    "truncated_es": ("C2", "^"),
    "full_es": ("C4", "D"),
    "tbptt": ("C3", "v"),
    "bptt": ("C5", "P"),
    "gpes": ("C6", "*"),
    "nres": ("C7", "X"),
    "uoro": ("C8", "<"),
    "dodge": ("C9", ">"),
    "forward_mode": ("black", "h"),
    "random_search": ("dimgrey", "p"),
    "pes_analytic": ("indigo", "d"),
    "pes_analytic_replacement": ("olivedrab", "H"),
    "reparameterized_es": ("steelblue", "8"),
}
"""The colour and the marker of an estimator. Colours alone do not tell all of them apart, for the
colour-blind and in print: every estimator has its own marker."""

OTHERS = (
    ("navy", "d"),
    ("deeppink", "H"),
    ("teal", "8"),
    ("goldenrod", "p"),
)
"""Colours and markers of methods without their own, such as an estimator at another setting."""


class Style(NamedTuple):
    """How pictures draw a method.

    Attributes:
        color: The colour of its line.
        marker: The marker of its end.
        dash: The line's dashes, as matplotlib writes them.
    """

    color: str
    marker: str
    dash: str


def styles(names: Iterable[str]) -> dict[str, Style]:
    """The style of every method of a picture; those without their own share ``OTHERS`` in order.

    A call such as ``pes(truncation=10, sigma=0.1)`` has the style of ``pes`` if no other name of
    the picture has it.
    """
    names = list(names)
    heads = {name: name if name in STYLES else re.sub(r"\(.*", "", name) for name in names}
    count = Counter(heads.values())
    own = {name: head for name, head in heads.items() if head in STYLES}
    own = {name: head for name, head in own.items() if name == head or count[head] == 1}
    others = [name for name in names if name not in own]
    given = {name: STYLES[head] for name, head in own.items()}
    given |= {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    return {name: Style(*given[name], "--" if own.get(name) in DASHED else "-") for name in names}

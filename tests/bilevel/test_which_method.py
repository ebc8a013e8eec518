"""The example of ``docs/bilevel_which_method.md`` runs, and its table names what exists."""

import doctest
import re
from pathlib import Path

import unrollgrad as ug

PAGE = Path(__file__).parents[2] / "docs" / "bilevel_which_method.md"


def test_the_example():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried > 5
    assert not failed


def test_the_page_names_every_method():
    named = set(re.findall(r"`(\w+)`", PAGE.read_text()))
    assert set(ug.bilevel.REGISTRY) <= named
    assert "bloop" in named

"""The bar on a terminal: it says what is done, and no time that it cannot know."""

import io

import pytest

from unrollgrad._core.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("unit", "remaining"), [("", False), ("steps", True)])
def test_only_equal_parts_have_a_remaining_time(unit, remaining, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    with progress_bar(2.0, unit) as progress:
        progress("start: compiling pes", 0.0)
    shown = terminal.getvalue()
    assert "compiling pes" in shown
    assert ("-:--:--" in shown) == remaining

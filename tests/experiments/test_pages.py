"""The numbers in README.md, docs/ and RESULTS.md are those that ``report`` puts there."""

import json
import re
import shutil
from pathlib import Path

import pytest

from experiments import __main__ as cli
from experiments._framework import pages, report, tables
from experiments._framework.results import ROOT
from tests.helpers import raises

FOLDER = ROOT / "experiments" / "results"
RESULTS = ROOT / "experiments" / "RESULTS.md"
PAGES = pages.files((ROOT / "README.md", ROOT / "docs"))
RECORDS = tables.Records(cli.TOPICS, FOLDER)
WRITTEN = "<!-- report: number distillation accuracy series=CG"
TO_WRITE = "run `python -m experiments report`, look at the change, and commit it"

CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)", re.DOTALL)
MEASURED = re.compile(
    r"±|(?<![/\w])\d[\d.,]*\s?(%|µs|ms|s\b|MiB|GiB|seconds|minutes|times\b)|\d\.\d"
)
VERSIONS = re.compile(r"(Python|jax) \d[.\d]*( to \d[.\d]*)?|Apache-2.0")


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_a_page_is_what_the_script_writes(page):
    text = page.read_text()
    assert text == pages.filled(text, RECORDS), TO_WRITE


def test_the_report_is_what_the_script_writes():
    assert RESULTS.read_text() == report.contents(cli.TOPICS, FOLDER, RESULTS), TO_WRITE


def by_hand(text: str) -> list[str]:
    """The lines outside code that have a measured number and do not call it an example."""
    text = CODE.sub("`", pages.without_markers(text))
    head = ""
    found = []
    for line in text.splitlines():
        head = head if line.startswith("|") else ""
        head = head or line
        if MEASURED.search(VERSIONS.sub("", line)) and "example" not in head + line:
            found.append(line)
    return found


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_no_measured_number_is_written_by_hand(page):
    assert by_hand(page.read_text()) == []


def test_a_number_by_hand_is_seen():
    marked = "it is <!-- report: number a b -->91.9 ± 0.3<!-- end --> percent; Python 3.11 to 3.13"
    assert by_hand(f"{marked}\n\nand `0.1 s` in code\n```\n12 %\n```\n") == []
    assert by_hand("of a formula: n/2 times as large") == []
    assert by_hand("| | for example |\n|---|---|\n| a | 8 minutes |") == []
    for line in ("3 to 9 % longer", "a ratio of 0.14", "it takes 12 s", "92 ± 1", "7 times"):
        assert by_hand(f"{marked}\n{line}") == [line]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", r"0\.\d+ ± 0\.\d+"),
        ("decimals=1 times=100", r"\d\d\.\d ± \d\.\d"),
        ("decimals=4", r"0\.\d{4} ± 0\.\d{4}"),
    ],
)
def test_a_number_between_markers(arguments, expected):
    text = f"a {WRITTEN} {arguments} -->?<!-- end --> b"
    filled = pages.filled(text, RECORDS)
    assert re.fullmatch(rf"a <!--.*-->{expected}<!-- end --> b", filled), filled
    assert pages.filled(filled, RECORDS) == filled


def test_a_claim_between_markers(tmp_path):
    """The verdict is the record's, and another record has another."""
    says = "nres learns with fewer inner steps than full_es"
    text = f'a <!-- report: claim lorenz-paper "{says}" -->?<!-- end --> b'
    filled = pages.filled(text, RECORDS)
    assert re.search(
        r"-->\*\*does not reproduce\*\*, nres .* against .* \(p = .*<!-- end --> b", filled
    )
    found = shutil.copytree(FOLDER / "lorenz-paper", tmp_path / "lorenz-paper") / "summary.json"
    summary = json.loads(found.read_text())
    for result in summary["results"]:
        if (result["metric"], result["estimator"]) == ("inner_steps_needed", "nres"):
            result["mean"] = 1.0
    found.write_text(json.dumps(summary))
    assert "-->yes, nres 1 " in pages.filled(text, RECORDS._replace(folder=tmp_path))


def test_a_table_is_on_lines_of_its_own():
    filled = pages.filled("<!-- report: estimators --><!-- end -->", RECORDS)
    assert filled.startswith("<!-- report: estimators -->\n| estimator |")
    assert filled.endswith(" |\n<!-- end -->")


@pytest.mark.parametrize(
    ("marker", "parts"),
    [
        ("<!-- report: nothing --><!-- end -->", ["`nothing`", "no function 'nothing'"]),
        ("<!-- report: number lorenz error estimator=no --><!-- end -->", ["has no error with"]),
        ('<!-- report: claim lorenz "2 < 1" --><!-- end -->', ["does not claim '2 < 1'", "nres"]),
        ("<!-- report: printed no_such --><!-- end -->", ["`printed no_such`", "no_such"]),
        ("<!-- report: verdicts no_such --><!-- end -->", ["no record of the topic", "estimators"]),
        ("<!-- report: pictures no_such --><!-- end -->", ["no picture of the topic", "no_such"]),
        ("<!-- report: printed --><!-- end -->", ["`printed`", "missing", "'name'"]),
        (f"{WRITTEN} --><!-- end -->", [f"{WRITTEN[13:]}`", "must not begin a line"]),
        ("a <!-- report: estimators --><!-- end -->", ["`estimators` must begin a line"]),
        ("<!-- report: estimators -->\n", ["has no `<!-- end -->`"]),
    ],
)
def test_a_marker_that_cannot_be_filled(marker, parts):
    with raises(ValueError, *parts):
        pages.filled(marker, RECORDS)


def test_the_command_writes_pages(tmp_path, capsys):
    page, other = tmp_path / "docs" / "a.md", tmp_path / "b.md"
    page.parent.mkdir()
    for path in (page, other):
        path.write_text(f"a {WRITTEN} --><!-- end -->\n")
    out = tmp_path / "RESULTS.md"
    where = ["--pages", str(other), str(page.parent)]
    cli.main(["report", "--folder", str(FOLDER), "--out", str(out), *where])
    assert "--><!--" not in page.read_text() + other.read_text()
    assert capsys.readouterr().out.split() == [str(path) for path in (out, other, page)]
    assert Path(out).read_text().startswith("# Results")

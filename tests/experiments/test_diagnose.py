"""``python -m experiments diagnose`` and the leaderboard at smoke scale."""

import dataclasses
import json

import pytest

from experiments import __main__ as cli
from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.tools import diagnose, leaderboard
from tests.helpers import present


@pytest.mark.experiments
def test_diagnose(tmp_path, capsys):
    settings = dataclasses.replace(diagnose.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(diagnose.EXPERIMENT, settings))
    printed = capsys.readouterr().out
    assert "Use " in printed
    assert "predicted error" in printed
    found = diagnose.rows(results.read(folder))
    (chosen,) = (name for name, row in found.items() if row["recommended"])
    saved = json.loads((folder / "diagnosis-0" / "summary.json").read_text())
    assert saved["ranking"][0]["name"] == chosen
    assert (folder / "diagnosis-0" / "figure.png").exists()
    assert (folder / "figure.png").exists()


@pytest.mark.experiments
def test_leaderboard(tmp_path, capsys):
    settings = dataclasses.replace(leaderboard.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(leaderboard.EXPERIMENT, settings))
    (rows,) = leaderboard.board(results.read(folder)).values()
    assert list(rows) == ["pes", "es_single"]
    for row in rows.values():
        assert 0 < row["steps"] < 10
        assert 0 < row["seconds"] < 10
    assert "at equal steps and at equal seconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [["--problem", "all"], ["--problem=all"], ["--seeds", "1", "--problem", "all"]]
)
def test_all_problems_are_the_leaderboard(flags, capsys):
    with pytest.raises(SystemExit):
        cli.main(["variance", *flags, "--help"])
    assert "leaderboard" in capsys.readouterr().out.splitlines()[0]


def test_regret_is_relative_to_the_least_error_at_equal_seconds():
    rows = {
        "a": {"steps": 1.0, "seconds": 2.0, "recommended": 1.0},
        "b": {"steps": 3.0, "seconds": 1.0, "recommended": 0.0},
        "c": {"steps": 3.0, "seconds": float("nan"), "recommended": 0.0},
    }
    assert leaderboard.regrets({"p": rows}) == {"p": 2.0}

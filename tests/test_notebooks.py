"""The notebooks run, and each equals its paired script."""

import runpy
import warnings
from pathlib import Path
from typing import Any

import jupytext
import matplotlib.pyplot as plt
import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))


def run(name):
    """Runs a notebook; returns its variables."""
    (script,) = (path for path in SCRIPTS if path.stem.startswith(name))
    return runpy.run_path(str(script))


@pytest.mark.experiments
def test_which_estimator(capsys):
    names = run("01")
    assert "estimator" in capsys.readouterr().out
    rows = {row["name"]: row for row in names["comparison"].rows}
    # The statements of the text.
    for name in ["tbptt", "truncated_es"]:
        assert rows[name]["bias"] > 3 * rows[name]["bias_se"]
    for name in ["bptt", "full_es", "pes", "es_single"]:
        assert rows[name]["bias"] < 4 * rows[name]["bias_se"]
        assert rows["bptt"]["variance"] <= rows[name]["variance"]
    explodes, tame = names["wild"].rows
    assert explodes["variance"] > 1e6 * tame["variance"]


@pytest.mark.experiments
def test_a_learned_optimizer(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    curves = run("02")["curves"]
    last = {name: sum(losses[-20:]) / 20 for name, losses in curves.items()}
    # The statements of the text.
    by_hand = [loss for name, loss in last.items() if "Adam" in name]
    assert last["learned"] < sorted(by_hand)[1]
    assert last["own"] < sorted(by_hand)[1]


@pytest.mark.experiments
def test_stochastic_bilevel(monkeypatch, capsys):
    monkeypatch.setattr(plt, "show", lambda: None)
    names = run("03")
    assert "lower the outer rate" in capsys.readouterr().out
    # The statements of the text.
    ends = {name: h[-5:].mean() - names["least"] for name, (_, h) in names["candidates"].items()}
    assert ends["saba"] < 1e-6 < 1e-5 < ends["soba"]
    assert ends["soba"] < min(ends["stocbio"], ends["f2sa"])
    assert names["decays"][:4].max() < names["decays"][4:].min()
    assert names["radius"](1.0, 0.1, 0.1) < 1 < names["radius"](0.1, 0.1, 0.1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_is_the_script(script):
    """After a change run: jupytext --to ipynb --execute notebooks/NAME.py."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nbformat warns about cell ids
        notebook: Any = jupytext.read(script.with_suffix(".ipynb"))
        paired: Any = jupytext.read(script)
    cells = [(c.cell_type, c.source) for c in notebook.cells]
    assert cells == [(c.cell_type, c.source) for c in paired.cells]
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert any("image/png" in o.get("data", {}) for c in code for o in c.outputs)
    assert not any(o.output_type == "error" for c in code for o in c.outputs)


def test_each_notebook_is_run():
    assert [script.stem[:2] for script in SCRIPTS] == ["01", "02", "03"]

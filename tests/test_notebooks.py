"""The notebooks run, and each equals its paired script."""

import runpy
import warnings
from pathlib import Path
from typing import Any

import jupytext
import matplotlib.pyplot as plt
import numpy as np
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


@pytest.fixture
def shown(monkeypatch):
    """Pictures are drawn and closed, not shown."""
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))


@pytest.mark.experiments
@pytest.mark.usefixtures("shown")
def test_a_learned_optimizer():
    names = run("02")
    found = {name.split(",")[0]: x for name, x in names["curves"].items() if "cosine" not in name}
    end = {name: float(names["last"](x).mean()) for name, x in found.items()}
    (cosine,) = (x for name, x in names["curves"].items() if "cosine" in name)
    # The statements of the text.
    assert names["last"](cosine).mean() < end["learned"] < end["Adam"]
    assert end["own"] < 1.1 * end["Adam"]


@pytest.mark.experiments
def test_bug_or_chaos(capsys):
    names = run("04")
    assert "exponent" in capsys.readouterr().out
    # The statements of the text.
    assert all(0.4 < x < 0.8 for x in names["losses"])
    assert max(map(abs, names["gradients"])) > 1e12
    assert names["nonfinite"].direction is None
    assert list(names["check"].verdicts) == ["agrees"]
    assert list(names["caught"].verdicts) == ["differs"]
    assert names["sweep"].growth == pytest.approx(names["exponent"], abs=0.1)
    assert 30 < float(names["chaos"].reproducible_steps["float32"]) < 40
    assert float(names["calm"].exponents[0]) < -0.5
    assert names["verdict"].recommendation.name not in ("bptt", "forward_mode", "dodge", "tbptt")


@pytest.mark.experiments
@pytest.mark.usefixtures("shown")
def test_metagradients():
    names = run("07")
    # The statements of the text.
    assert names["wrong"][names["worst"]].sum() > 90
    assert (
        float(names["smooth"].smoothness[1]) > 0.9 > 0.5 > float(names["smoothness"].smoothness[1])
    )
    assert names["correlations"]["smooth"] > 0.9
    assert names["correlations"]["rough"] < names["correlations"]["smooth"] - 0.1
    assert names["after"] > names["before"] + 0.05
    assert names["share"] < 0.5 * names["wrong"].mean()


@pytest.mark.experiments
@pytest.mark.usefixtures("shown")
def test_reward_gradients(capsys):
    names = run("05")
    assert "DRTune" in capsys.readouterr().out
    # The statements of the text.
    rows = {row["name"]: row for row in names["comparison"].rows}
    assert rows["DRaFT-1"]["bias"] > 3 * rows["DRaFT-1"]["bias_se"]
    assert rows["DRaFT-1"]["variance"] < 0.1 * rows["DRaFT"]["variance"]
    target, tilted, found = names["tilted"].argmax(), names["tilted"], names["found"]
    assert min(found["DRaFT"][target], found["DRaFT-1"][target]) > 0.98
    np.testing.assert_allclose(found["adjoint matching"], tilted, atol=0.1)
    assert abs(found["untrained"] - tilted).max() > 0.15

    def away(name):  # the distance to the nearest Gaussian's mean, in standard deviations
        gaps = names["samples"][name][:, None] - names["MEANS"]
        return np.median(np.sqrt(np.sum(gaps**2, -1)).min(1)) / names["STD"]

    assert away("adjoint matching") == pytest.approx(away("untrained"), rel=0.25)
    assert away("DRaFT") < 0.7 * away("untrained")


@pytest.mark.experiments
@pytest.mark.usefixtures("shown")
def test_tune_while_you_train():
    names = run("06")
    least, start = (float(names["h"](names[name])) for name in ("best", "start"))
    found = {
        name: float(names["h"](run.history["place"][-1])) for name, run in names["runs"].items()
    }
    # The statements of the text.
    assert found["soba"] < found["delta_stn"] < found["pes"] < least + 0.05 * (start - least)
    assert names["costs"]["delta_stn"] < names["costs"]["soba"] < 0.1 * names["costs"]["pes"]
    assert np.exp(names["runs"]["pes"].theta["rate"]) > 10 * 0.01
    ends = {name: float(losses[-1]) for name, losses in names["curves"].items()}
    assert ends["SGD, 0.1"] < ends["APO, from 0.001"] < ends["SGD, 0.001"] - 0.3


@pytest.mark.experiments
@pytest.mark.usefixtures("shown")
def test_rnn_and_streaming():
    losses = {name: x[-10:].mean() for name, x in run("08")["losses"].items()}
    assert losses["tbptt"] > 0.6  # a net that says 0 has 0.83
    assert losses["forward_mode"] < 0.05
    assert losses["es_single"] < losses["pes"] < 0.6


@pytest.mark.experiments
@pytest.mark.usefixtures("shown")
def test_hyperparameters():
    accuracies = run("09")["accuracies"]
    assert accuracies["found"] > 0.85 > 0.5 > accuracies["start"]


@pytest.mark.experiments
@pytest.mark.usefixtures("shown")
def test_implicit_and_bilevel():
    names = run("10")
    np.testing.assert_allclose(names["found"].grad, names["slope"], atol=1e-5)
    np.testing.assert_allclose(names["difference"], names["slope"][0], rtol=0.01)
    warm, cold, short = (float(names["objective"](x.theta)) for x in names["results"].values())
    assert warm == pytest.approx(cold, rel=0.01)
    assert short > 1.02 * cold
    assert np.median(names["penalty"][5:]) > 10 * np.max(names["penalty"][:5])


@pytest.mark.experiments
@pytest.mark.usefixtures("shown")
def test_apo_in_your_loop():
    names = run("11")
    last = {name: losses[-100:].mean() for name, losses in names["curves"].items()}
    assert last["APO, from 0.001"] < 0.3 * last["SGD, 0.01"] < last["SGD, 0.001"]
    assert last["SGD, 1.0"] < last["APO, from 0.001"]  # a grid can be better
    assert names["rates"][-1] > 50 * names["rates"][0]


@pytest.mark.experiments
def test_your_own_estimator(capsys):
    names = run("12")
    assert "forward_gradient" in capsys.readouterr().out
    mine, _, cut = names["comparison"].rows
    assert mine["bias"] < 4 * mine["bias_se"]
    assert cut["bias"] > 0.3 * cut["reference_norm"]
    assert mine["variance"] == pytest.approx(6 * mine["reference_norm"] ** 2, rel=0.15)
    assert names["losses"][-1] < 0.05 * names["losses"][0]


@pytest.mark.experiments
@pytest.mark.usefixtures("shown")
def test_many_devices():
    names = run("13")
    one, many = names["grads"].values()
    np.testing.assert_allclose(many, one, rtol=1e-4)
    first, second = names["losses"].values()
    np.testing.assert_allclose(first, second, rtol=0.01)
    assert first[-1] < 0.5 * first[0]


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
    assert [script.stem[:2] for script in SCRIPTS] == [
        f"{i:02}" for i in (1, 2, 3, 4, 5, 6, *range(7, 14))
    ]

"""``reward_memory`` at smoke scale."""

import dataclasses

import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.cost import reward_memory
from tests.helpers import present

pytestmark = pytest.mark.experiments


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(reward_memory.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(reward_memory.EXPERIMENT, settings))
    found = {(r.labels["remat"], r.labels["last"], r.metric): r.value for r in results.read(folder)}
    assert "remat" in capsys.readouterr().out
    assert found["step", "8", "mebibytes"] < 0.5 * found["none", "8", "mebibytes"]
    assert found["reverse", "8", "mebibytes"] < found["step", "8", "mebibytes"]
    for name in ("step", "log", "by hand"):
        assert found[name, "8", "error"] < 1e-5
    assert 1e-4 < found["reverse", "8", "error"] < 0.1  # the adjoint of the continuous process
    claims = reward_memory.EXPERIMENT.claims(results.read_summary(folder))
    assert [claim.holds for claim in claims if "latents" in claim.says] == [True] * 3
    assert any("4 and 8 steps" in claim.says for claim in claims)  # loops, of different lengths
    ratio, median = found["by hand", "8", "ratio"], found["by hand", "8", "median_ratio"]
    assert 0 < ratio == median

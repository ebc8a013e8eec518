"""``python -m experiments remat`` at smoke scale."""

import dataclasses

import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.cost import remat
from tests.helpers import present

pytestmark = pytest.mark.experiments


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(remat.SCALES["smoke"], out=tmp_path)
    records = results.read(present(framework.execute(remat.EXPERIMENT, settings)))
    printed = capsys.readouterr().out
    found = {(r.labels["workload"], r.labels["remat"], r.step, r.metric): r.value for r in records}
    for name in remat.KINDS:
        assert f"remat {name:>8}" in printed
        assert found["mlp", name, None, "mebibytes"] > 0
        assert found["mlp", name, None, "seconds"] > 0
    # More steps take more memory, and fewer states take less.
    assert found["small", "none", 16, "mebibytes"] > 3 * found["small", "none", 4, "mebibytes"]
    assert found["small", "step", 16, "mebibytes"] < found["small", "none", 16, "mebibytes"]

"""``mixed_mode`` at smoke scale."""

import dataclasses

import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.cost import mixed_mode
from tests.helpers import present

pytestmark = pytest.mark.experiments


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(mixed_mode.SCALES["smoke"], out=tmp_path)
    records = results.read(present(framework.execute(mixed_mode.EXPERIMENT, settings)))
    assert len(records) == 2 * 2 * len(mixed_mode.ESTIMATORS)
    assert all(r.value > 0 for r in records)
    assert "bptt, remat step: memory x" in capsys.readouterr().out

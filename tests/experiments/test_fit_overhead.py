"""``python -m experiments fit_overhead`` measures both; times are not tested."""

import dataclasses

import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.cost import fit_overhead
from tests.helpers import present

pytestmark = pytest.mark.experiments


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(fit_overhead.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(fit_overhead.EXPERIMENT, settings))
    records, printed = results.read(folder), capsys.readouterr().out
    for layout in ["64 workers", "500 pairs of one worker"]:
        assert layout in printed
        mine = [r for r in records if r.labels["layout"] == layout]
        found = {(r.step, r.metric): r.value for r in mine}
        assert sorted({present(step) for step, _ in found}) == [1, 2]
        for step in (1, 2):
            ratio = found[step, "fit_microseconds"] / found[step, "bare_microseconds"]
            assert abs(found[step, "ratio"] / ratio - 1) < 1e-6

"""``reward_digits`` at smoke scale: the rewards, the measures and the pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.samplers import digit_model, reward_digits
from tests.helpers import present

pytestmark = pytest.mark.experiments


def test_the_measures_of_images():
    flat, noisy = jnp.zeros((3, 64)), jax.random.normal(jax.random.key(0), (3, 64))
    assert float(digit_model.total_variation(flat[0])) == 0
    ramp = jnp.tile(jnp.arange(8.0), (8, 1)).ravel()  # 1 across, 0 down
    assert float(digit_model.total_variation(ramp)) == pytest.approx(0.5)
    assert float(digit_model.diversity(flat)) == 0
    apart = jnp.stack([jnp.zeros(64), jnp.ones(64)])
    assert float(digit_model.diversity(apart)) == pytest.approx(8.0)
    batched = jax.jit(jax.vmap(digit_model.zlib_bytes))
    np.testing.assert_array_equal(batched(noisy), digit_model.sizes(noisy))
    assert digit_model.sizes(flat).max() < digit_model.sizes(noisy).min()


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(reward_digits.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(reward_digits.EXPERIMENT, settings))
    records, summary = results.read(folder), results.read_summary(folder)
    names = {r["estimator"] for r in summary.results}
    assert set(reward_digits.runs(0.1)) | {"data", "data, eights", "untrained"} == names
    pixels = [r for r in records if r.metric == "pixel"]
    assert len(pixels) == len(names) * reward_digits.SHOWN * 64
    untrained = summary.find("judge", estimator="untrained")
    for name in reward_digits.runs(0.1):  # the curves begin at the untrained model
        curve = [r.value for r in records if r.labels["estimator"] == name and r.metric == "judge"]
        assert curve[0] == pytest.approx(present(untrained)["mean"], rel=1e-5)
    assert all(claim.holds is None for claim in reward_digits.EXPERIMENT.claims(summary))
    printed = capsys.readouterr().out
    assert [name for name in names if name not in printed] == []

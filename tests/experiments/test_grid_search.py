"""``fit`` on the schedule of docs/long_runs.md ends below a grid search's best of 40 schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from experiments.problems.digits import digits

pytestmark = [pytest.mark.experiments, pytest.mark.optimized]


def test_fit_ends_below_a_grid_search():
    problem, theta = digits(horizon=100)
    pes = ug.average(ug.pes(problem, truncation=10, sigma=0.1), num_workers=16)
    key = jax.random.key(0)
    tuned = ug.fit(pes, theta, optax.adam(0.02), num_steps=500, key=key).theta
    grid = [
        {
            "log_lr": np.log(np.geomspace(first, last, 4)).astype(np.float32),
            "momentum_logit": np.full(4, np.log(momentum / (1 - momentum)), np.float32),
        }
        for first in (0.1, 0.2, 0.5, 1.0)
        for last in (0.02, 0.05, 0.1, 0.2, 0.5)
        for momentum in (0.5, 0.9)
    ]
    keys = jax.random.split(jax.random.key(1), 200)  # fresh episodes

    @jax.jit
    def losses(thetas):
        def loss(theta):
            return jnp.mean(jax.vmap(lambda k: ug.episode_loss(problem, k, theta))(keys))

        return jax.lax.map(loss, thetas)

    start, ours, *others = losses(jax.tree.map(lambda *x: jnp.stack(x), theta, tuned, *grid))
    assert ours < 1.05 * min(others)
    assert min(others) < 0.9 * start

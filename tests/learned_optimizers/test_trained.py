"""The optimizers that come with the repository, loaded where there is only the core."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import stored

TRAINED = Path(__file__).parents[2] / "experiments" / "learned_optimizers" / "trained"

TRAINING = """
import json, sys
for m in ["flax", "matplotlib", "sklearn", "rich", "orbax", "tyro", "experiments"]:
    sys.modules[m] = None
import jax, jax.numpy as jnp, optax
import unrollgrad as ug

optimizer = ug.learned_optimizers.load(sys.argv[1])
keys = jax.random.split(jax.random.key(0), 4)
x = jax.random.normal(keys[0], (256, 16))
y = jnp.argmax(x @ jax.random.normal(keys[1], (16, 4)), axis=1)
params = [0.25 * jax.random.normal(keys[2], (16, 32)), 0.2 * jax.random.normal(keys[3], (32, 4))]

def loss(params, x, y):
    logits = jnp.tanh(x @ params[0]) @ params[1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

@jax.jit
def step(carry, i):
    params, state = carry
    rows = (16 * i + jnp.arange(16)) % 256
    grad = jax.grad(loss)(params, x[rows], y[rows])
    updates, state = optimizer.update(grad, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), loss(params, x, y)

carry = params, optimizer.init(params)
_, losses = jax.lax.scan(step, carry, jnp.arange(100))
print(json.dumps([float(loss(params, x, y)), *losses[19::20].tolist()]))
"""


@pytest.mark.parametrize("name", sorted(path.stem for path in TRAINED.glob("*.npz")))
def test_the_recorded_curve(name):
    command = [sys.executable, "-c", TRAINING, str(TRAINED / f"{name}.npz")]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    losses = json.loads(out.stdout)
    assert losses[-1] < 0.3 * losses[0]
    stored.expect(f"trained {name}", {str(20 * i): loss for i, loss in enumerate(losses)})

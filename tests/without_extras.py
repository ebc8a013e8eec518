"""The package without its extras; ``test_package.py`` runs this as a program.

It prints as JSON the extras that importing the package asked for and, for each trained
optimizer, the losses of a training run with it.
"""

import importlib
import json
import sys

EXTRAS = ("experiments", "flax", "matplotlib", "orbax", "quax", "rich", "sklearn", "tyro")


class Refuse:
    """A finder for ``sys.meta_path``: it hides the extras, and records requests for them."""

    def __init__(self):
        self.asked = []

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def losses(name):
    """The losses on a small classification task at the start and after every 20 of 100 steps."""
    import jax
    import jax.numpy as jnp
    import optax

    import unrollgrad as ug

    optimizer = ug.learned_optimizers.load(name)

    def loss(params, x, y):
        logits = jnp.tanh(x @ params[0]) @ params[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def train(key):
        keys = jax.random.split(key, 4)
        x = jax.random.normal(keys[0], (256, 16))
        y = jnp.argmax(x @ jax.random.normal(keys[1], (16, 4)), axis=1)
        params = [0.25 * jax.random.normal(keys[2], (16, 32))]
        params += [0.2 * jax.random.normal(keys[3], (32, 4))]

        def step(carry, i):
            params, state = carry
            rows = (16 * i + jnp.arange(16)) % 256
            grad = jax.grad(loss)(params, x[rows], y[rows])
            updates, state = optimizer.update(grad, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), loss(params, x, y)

        _, along = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(100))
        return jnp.append(loss(params, x, y), along[19::20])

    return train(jax.random.key(0)).tolist()


def main(names):
    """Hides the extras before the package is imported."""
    refuse = Refuse()
    sys.meta_path.insert(0, refuse)
    importlib.import_module("unrollgrad")
    imported = [*refuse.asked, *({"lineax", "equinox"} & set(sys.modules))]
    print(json.dumps({"imported": imported, "losses": [losses(name) for name in names]}))


if __name__ == "__main__":
    main(sys.argv[1:])

"""The mixed-mode inner gradient: jax's numbers under jvp, vjp, vmap and twice; the experiment."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

from experiments import experiment as framework
from experiments import mixed_gradient, mixed_mode, results


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def _scalar(value_and_grad):
    """Of params and what the loss closes over, through the inner gradient and its value."""

    def scalar(params, closed):
        rows, scale = closed

        def loss(params):
            hidden = jnp.tanh(rows @ params["a"]) ** 3
            cross = jnp.sum(params["a"]) * jnp.sum(params["b"] ** 2)
            return jnp.sum(hidden) * jnp.exp(scale) + scale * jnp.sum(params["b"] ** 4) + cross

        out = value_and_grad(loss)(params)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out))

    return scalar


def _example():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (3, 2)), "b": jax.random.normal(keys[1], (2,))}
    return params, (jax.random.normal(keys[2], (7, 3)), jnp.float64(0.3))


def _under(*transforms):
    def derivative(f):
        for transform in transforms:
            f = transform(f)
        return f

    return derivative


FORWARD, REVERSE = (lambda f, mode=mode: mode(f, (0, 1)) for mode in (jax.jacfwd, jax.jacrev))
BATCHED = lambda f: jax.vmap(f, (0, None))  # noqa: E731

DERIVATIVES = {
    "jvp": _under(FORWARD),
    "vjp": _under(REVERSE),
    "vjp in params": _under(jax.grad),
    "vjp in the rest": _under(lambda f: jax.grad(f, 1)),
    "forward over reverse": _under(REVERSE, FORWARD),
    "reverse over forward": _under(FORWARD, REVERSE),
    "reverse over reverse": _under(REVERSE, REVERSE),
    "forward over forward": _under(FORWARD, FORWARD),
    "three times": _under(REVERSE, REVERSE, REVERSE),
    "jit of vjp": _under(REVERSE, jax.jit),
    "vmap of vjp": _under(REVERSE, BATCHED),
    "vjp of vmap": _under(BATCHED, lambda f: lambda *x: jnp.sum(f(*x)), REVERSE),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_the_numbers_of_jax(name, x64):
    params, closed = _example()
    if "vmap" in name:
        params = jax.tree.map(lambda x: jnp.stack([x, x + 0.1, 2 * x]), params)
    ours, theirs = (
        DERIVATIVES[name](_scalar(f))(params, closed)
        for f in (mixed_gradient.value_and_grad, jax.value_and_grad)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_what_is_left_to_jax():
    """Effects and reverse-mode rules: the same numbers, backwards."""

    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))

    def outer(w, f, value_and_grad):
        return jnp.sum(value_and_grad(lambda w: jnp.sum(f(w)))(w)[1] ** 2)

    def printing(w):
        jax.debug.callback(lambda _: None, w)
        return w**3

    w = jnp.arange(3.0)
    for f in (cube, printing):
        ours, theirs = (
            jax.grad(outer)(w, f, each)
            for each in (mixed_gradient.value_and_grad, jax.value_and_grad)
        )
        chex.assert_trees_all_close(ours, theirs)


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(mixed_mode.SCALES["smoke"], out=tmp_path)
    records = results.read(framework.execute(mixed_mode.EXPERIMENT, settings))
    assert len(records) == 2 * 2 * len(mixed_mode.ESTIMATORS)
    assert all(r.value > 0 for r in records)
    assert "bptt, remat step: memory x" in capsys.readouterr().out

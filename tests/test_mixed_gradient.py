"""The mixed-mode inner gradient has jax's numbers under jvp, vjp, vmap and twice."""

import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import unrollgrad as ug
from tests.helpers import mistyped, raises
from unrollgrad._training import mixed_gradient


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def _scalar(value_and_grad):
    """A scalar of params and of closed-over arrays, through the inner gradient and its value."""

    def scalar(params, closed):
        rows, scale = closed

        def loss(params):
            hidden = jnp.tanh(rows @ params["a"]) ** 3
            cross = jnp.sum(params["a"]) * jnp.sum(params["b"] ** 2)
            return jnp.sum(hidden) * jnp.exp(scale) + scale * jnp.sum(params["b"] ** 4) + cross

        out = value_and_grad(loss)(params)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out))

    return scalar


def _plain_sums(value_and_grad):
    """Outputs that are used linearly or not at all, so that their cotangents are constants."""

    def scalar(params, closed):
        rows, scale = closed

        def loss(params):
            return jnp.sum(jnp.tanh(rows @ params["a"]) ** 3) + scale * jnp.sum(params["b"] ** 4)

        value, grad = value_and_grad(loss)(params)
        _, again = value_and_grad(lambda b: jnp.sum(b**3) * scale)(params["b"])
        return value + jnp.sum(grad["a"]) + 2 * jnp.sum(again)

    return scalar


def _training(value_and_grad):
    """Through scanned steps that are recomputed in the backward pass."""

    def scalar(params, closed):
        rows, scale = closed

        def loss(params):
            return jnp.mean(jnp.tanh(rows @ params["a"] + params["b"]) ** 2) * jnp.exp(scale)

        @jax.checkpoint
        def step(params, _):
            _, grad = value_and_grad(loss)(params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grad), None

        return loss(jax.lax.scan(step, params, length=3)[0])

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


LOSSES = {"all outputs": _scalar, "sums": _plain_sums, "training": _training}
CASES = [("all outputs", name) for name in DERIVATIVES]
CASES += [
    (loss, name)
    for loss in ("sums", "training")
    for name in ("jvp", "vjp", "forward over reverse", "reverse over reverse")
]


EAGER = [("sums", "jvp"), ("sums", "vjp")]
"""Runs one primitive at a time, as without ``jit``; the other cases are one program each."""


QUICK = [("all outputs", "vmap of vjp"), ("training", "forward over reverse")]
"""The cases of the default run."""


@pytest.mark.parametrize(
    ("loss", "name"),
    [pytest.param(*c, marks=[pytest.mark.experiments] * (c not in QUICK)) for c in CASES],
)
def test_the_numbers_of_jax(loss, name, x64):
    params, closed = _example()
    if "vmap" in name:
        params = jax.tree.map(lambda x: jnp.stack([x, x + 0.1, 2 * x]), params)
    both = (
        DERIVATIVES[name](LOSSES[loss](f)) for f in (ug.mixed_value_and_grad, jax.value_and_grad)
    )
    if (loss, name) not in EAGER:
        both = map(jax.jit, both)
    ours, theirs = (derivative(params, closed) for derivative in both)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.experiments
def test_a_number_that_is_not_finite_stays_where_it_is():
    """Only the coordinate whose derivative is not finite is affected."""

    def second(w, mode):
        return jax.jvp(lambda w: mode(lambda w: w["a"] ** 2 + w["b"] ** 2)(w)[1], (w,), (w,))[1]

    w = {"a": jnp.float32(jnp.inf), "b": jnp.float32(1.0)}
    for mode in (ug.mixed_value_and_grad, jax.value_and_grad):
        out = second(w, mode)
        assert out["b"] == 2
        assert jnp.isinf(out["a"])


@pytest.mark.experiments
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64])
def test_other_dtypes(dtype):
    w = jnp.array([1.0, 2.0, -0.5], dtype)

    def norm(value_and_grad, scale):
        grad = value_and_grad(lambda w: jnp.sum(jnp.abs(w) ** 4 * scale))(w)[1]
        return jnp.sum(jnp.abs(grad) ** 2).astype(jnp.float32)

    ours, theirs = (
        jax.value_and_grad(norm, 1)(f, 0.7) for f in (ug.mixed_value_and_grad, jax.value_and_grad)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.experiments
def test_in_shard_map():
    """The gradient is left to jax, which sums over devices if it must."""
    mesh = jax.make_mesh((8,), ("d",))

    def spread(value_and_grad):
        def loss(w, c):
            return jnp.sum(value_and_grad(lambda w: jnp.sum(w**3 * c))(w)[1] ** 2)

        return jax.shard_map(
            jax.grad(lambda w, c: jax.lax.psum(loss(w, c), "d"), (0, 1)),
            mesh=mesh,
            in_specs=(jax.P("d"), jax.P()),
            out_specs=(jax.P("d"), jax.P()),
        )

    with jax.set_mesh(mesh):
        arguments = jax.device_put(jnp.arange(16.0), jax.P("d")), jnp.float32(0.5)
        ours, theirs = (
            jax.jit(spread(f))(*arguments) for f in (ug.mixed_value_and_grad, jax.value_and_grad)
        )
    chex.assert_trees_all_close(ours, theirs)


@pytest.mark.experiments
def test_what_is_left_to_jax():
    """Losses with effects or reverse-mode rules get jax's own reverse mode."""

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
            jax.grad(outer)(w, f, each) for each in (ug.mixed_value_and_grad, jax.value_and_grad)
        )
        chex.assert_trees_all_close(ours, theirs)


def training(value_and_grad):
    """Four scanned layers, trained by Adam; theta has a weight for each row."""
    rows = jax.random.normal(jax.random.key(1), (16, 8))

    def loss(theta, params, batch, key):
        h = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), rows, params)[0]
        return jnp.mean(jnp.exp(theta["weights"])[:, None] * (h - 1) ** 2)

    problem = ug.training_problem(
        loss=loss,
        init_params=lambda key: jax.random.normal(key, (4, 8, 8)) / 8,
        optimizer=lambda theta, t: optax.adam(jnp.exp(theta["log_rate"]), eps_root=1e-6),
        sample_batch=lambda key: None,
        horizon=8,
        value_and_grad=value_and_grad,
    )
    return problem, {"weights": jnp.zeros(16), "log_rate": jnp.float32(-5)}


def compiled(value_and_grad, remat):
    problem, theta = training(value_and_grad)
    estimator, key = ug.bptt(problem, remat=remat), jax.random.key(0)
    arguments = key, theta, estimator.init(key, theta)
    program = jax.jit(estimator.estimate).lower(*arguments).compile()
    return program(*arguments)[0], program


def count_of_products(program):
    """The number of matrix products in a program's text."""
    return len(re.findall(r" dot\(", program.as_text()))


def test_training_with_it_has_the_same_gradient(monkeypatch):
    """With every ``remat`` that keeps the inner gradients: they are not computed again."""
    expected, _ = compiled(jax.value_and_grad, "step")
    for remat in ("step", "log"):
        got, kept = compiled(ug.mixed_value_and_grad, remat)
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)
        with monkeypatch.context() as patch:
            patch.setattr(mixed_gradient, "checkpoint_name", lambda x, name: x)
            _, again = compiled(ug.mixed_value_and_grad, remat)
        assert count_of_products(kept) < count_of_products(again)


def test_error():
    with raises(TypeError, "`value_and_grad` must be a function like jax.value_and_grad", "str"):
        training(mistyped("mixed"))
    with raises(ValueError, "must be a scalar; got shape (3,)"):
        ug.mixed_value_and_grad(lambda w: w)(jnp.ones(3))

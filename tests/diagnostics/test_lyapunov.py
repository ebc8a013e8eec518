"""Lyapunov exponents equal known ones within their standard errors, and derivatives exist."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import counted, raises
from unrollgrad.diagnostics import episode_map, lyapunov, lyapunov_by_distance, lyapunov_of_map

pytestmark = pytest.mark.optimized
KEY = jax.random.key(0)
LN2 = math.log(2)

LINES = {  # name: (kind, parameter, exponent, rounding of the exponent as it is quoted)
    "logistic 4": (0, 4.0, LN2, 0),
    "logistic 3.2": (0, 3.2, 0.5 * math.log(0.16), 1e-9),
    "logistic 3.5": (0, 3.5, -0.87251, 5e-6),
    "logistic 3.9": (0, 3.9, 0.49528, 5e-4),  # itself from 2e5 steps
    "logistic 2": (0, 2.0, -np.inf, 0),
    "tent": (1, 1.9999, math.log(1.9999), 1e-9),
    "doubling": (2, 1.9999, math.log(1.9999), 1e-9),
}
GOLDEN = math.log((3 + math.sqrt(5)) / 2)
PLANES = {
    "henon": (0, [0.4196, -1.6235], 1e-4),
    "cat": (1, [GOLDEN, -GOLDEN], 1e-9),
    "linear": (2, [math.log(1.2), math.log(0.7)], 1e-9),  # eigenvalues 1.2, 0.7; not normal
    "spiral": (3, [math.log(0.9)] * 2, 1e-3),  # 0.9 exp(+-i): rotates without end
}
FLOWS = {  # name: (system, integrator, dt, rho, exponents per unit time, rounding)
    "lorenz": (0, 0, 0.01, 28.0, [0.9058, 0, -14.571], 2e-3),
    "lorenz, Euler": (0, 1, 0.005, 28.0, [0.960, 0.001, -14.789], 2e-3),
    "lorenz 20": (0, 0, 0.01, 20.0, [-0.15480, -0.15480, -13.35711], 5e-3),  # of its fixed point
    "roessler": (1, 0, 0.05, 0.0, [0.0714, 0, -5.39], 2e-3),
}


def batch(table, column):
    return jnp.array([row[column] for row in table.values()])


@functools.cache
def lines():
    """Exponents and errors of all maps of the line, by derivatives and by distance."""

    def one(kind, r):
        def step(state):
            x = state["x"]
            maps = [r * x * (1 - x), r * jnp.minimum(x, 1 - x), r * x % 1]
            return {"x": jnp.stack(maps)[state["kind"]], "kind": state["kind"]}

        start = {"x": jnp.asarray(0.3), "kind": kind}
        exact = lyapunov_of_map(step, start, 40_000, discard=200)
        near = lyapunov_by_distance(step, start, 4000, discard=200)
        return exact.exponents[0], exact.se[0], near.exponents[0], near.se[0]

    with jax.enable_x64(True):
        found = jax.jit(jax.vmap(one))(batch(LINES, 0), batch(LINES, 1))
        return dict(zip(LINES, np.asarray(found).T, strict=True))


@pytest.mark.parametrize("name", LINES)
def test_maps_of_the_line(name):
    exponent, se, *_ = lines()[name]
    _, _, truth, rounding = LINES[name]
    if truth == -np.inf:
        assert exponent < -30
    else:
        assert abs(exponent - truth) < 4 * se + rounding
        assert se < 0.01


@pytest.mark.parametrize("name", LINES)
def test_two_trajectories(name):
    """The distance of two trajectories gives the same."""
    exponent, se, near, near_se = lines()[name]
    if name == "logistic 2":
        assert near < -10
    else:
        assert abs(near - exponent) < 4 * (se + near_se) + 1e-5


@functools.cache
def planes():
    """Exponents of all maps of the plane, log|det| of their steps, and exponents without QR."""
    matrices = np.array([[[2.0, 1], [1, 1]], [[1.2, 5], [0, 0.7]]])
    turn = 0.9 * np.array([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]])

    def one(kind):
        def step(s):
            henon = jnp.stack([1 - 1.4 * s[0] ** 2 + s[1], 0.3 * s[0]])
            cat = matrices[0] @ s % 1
            return jnp.stack([henon, cat, matrices[1] @ s, turn @ s])[kind]

        start = jnp.array([0.1, 0.2])
        found = lyapunov_of_map(step, start, 10_000, num_exponents=2, discard=200)
        return found.exponents, found.se, *along(step, start, 10_000, 200)

    with jax.enable_x64(True):
        found = jax.jit(jax.vmap(one))(batch(PLANES, 0))
        return {name: [np.asarray(x)[i] for x in found] for i, name in enumerate(PLANES)}


def along(step, start, num_steps, discard):
    """The mean of log|det| over the steps, and the growth of columns that are only normalised."""

    def body(carry, _):
        state, frame = carry
        matrix = jax.jacfwd(step)(state)
        image = matrix @ frame
        size = jnp.linalg.norm(image, axis=0)
        return (step(state), image / size), (
            jnp.log(jnp.abs(jnp.linalg.det(matrix))),
            jnp.log(size),
        )

    carry = start, jnp.eye(len(start)) + 0.1
    _, rows = jax.lax.scan(body, carry, length=discard + num_steps)
    return [x[discard:].mean(axis=0) for x in rows]


@pytest.mark.parametrize("name", PLANES)
def test_maps_of_the_plane(name):
    exponents, se, determinant, _ = planes()[name]
    _, truth, rounding = PLANES[name]
    assert np.all(np.abs(exponents - truth) < 4 * se + rounding)
    assert np.all(se < 0.01)
    assert abs(exponents.sum() - determinant) < 1e-6
    if name == "henon":
        assert abs(exponents.sum() - math.log(0.3)) < 1e-9


def test_without_qr_the_second_exponent_is_wrong():
    exponents, se, _, aligned = planes()["henon"]
    assert np.all(np.abs(aligned - exponents[0]) < 0.01)
    assert abs(aligned[1] - exponents[1]) > 100 * se[1]


@functools.cache
def flows():
    def one(system, integrator, dt, rho):
        def field(s):
            x, y, z = s
            lorenz = jnp.stack([10 * (y - x), (rho - z) * x - y, x * y - 8 / 3 * z])
            roessler = jnp.stack([-y - z, x + 0.2 * y, 0.2 + z * (x - 5.7)])
            return jnp.where(system == 0, lorenz, roessler)

        def step(s):
            a = field(s)
            b = field(s + dt / 2 * a)
            c = field(s + dt / 2 * b)
            d = field(s + dt * c)
            return s + dt * jnp.where(integrator == 1, a, (a + 2 * b + 2 * c + d) / 6)

        start = jnp.array([1.2, 1.3, 1.6])
        found = lyapunov_of_map(step, start, 40_000, num_exponents=3, discard=10_000)
        return found.exponents / dt, found.se / dt, *along(step, start, 40_000, 10_000)

    with jax.enable_x64(True):
        found = jax.jit(jax.vmap(one))(*(batch(FLOWS, i) for i in range(4)))
        return {name: [np.asarray(x)[i] for x in found] for i, name in enumerate(FLOWS)}


@pytest.mark.parametrize("name", FLOWS)
def test_flows(name):
    exponents, se, determinant, _ = flows()[name]
    *_, dt, _, truth, rounding = FLOWS[name]
    assert np.all(np.abs(exponents - truth) < 4 * se + rounding)
    assert np.all(se < 0.1)
    assert abs(exponents.sum() * dt - determinant) < 1e-6
    if name == "lorenz":
        assert abs(exponents.sum() + 10 + 1 + 8 / 3) < 1e-3  # the integrator's error


def descent(momentum):
    """Gradient descent on x^2 / 2 with a learning rate theta."""
    return ug.training_problem(
        loss=lambda theta, params, batch, key: 0.5 * params**2,
        init_params=lambda key: jnp.float32(1.0),
        optimizer=lambda theta, t: optax.sgd(theta, momentum=momentum),
        sample_batch=lambda key: 0.0,
        horizon=400,
    )


def test_training_loops():
    """Gradient descent has ln|1 - rate|, heavy balls the roots of their polynomial."""
    rates = jnp.array([0.5, 1.9, 2.1])
    found = jax.jit(jax.vmap(lambda rate: lyapunov(descent(None), rate, key=KEY)))(rates)
    np.testing.assert_allclose(found.exponents[:, 0], np.log(np.abs(1 - rates)), rtol=1e-4)
    np.testing.assert_allclose(found.horizon_efolds, 400 * np.log(np.abs(1 - rates)), rtol=1e-4)
    assert found.per_step.shape == (3, 400, 1)
    rates = jnp.array([0.001, 0.5])  # real roots, and a pair of complex ones
    two = functools.partial(lyapunov, descent(0.9), key=KEY, num_exponents=2)
    found = jax.tree.map(np.asarray, jax.jit(jax.vmap(two))(rates))
    for i, rate in enumerate(np.asarray(rates)):
        roots = np.abs(np.roots([1, -(1.9 - rate), 0.9]))
        sizes = np.log(np.sort(roots)[::-1])
        assert np.all(np.abs(found.exponents[i] - sizes) < 4 * found.se[i] + 0.01)
        assert abs(found.exponents[i].sum() - np.log(0.9)) < 1e-6


def test_transient_growth():
    """The peak of the growth is reported where all exponents are negative."""
    shear = np.array([[0.9, 100], [0, 0.5]], np.float32)
    found = lyapunov_of_map(lambda s: shear @ s, jnp.ones(2), 400)
    assert found.exponents[0] < 0
    assert 3 < found.peak_efolds < 5.5


def test_influence_balancing():
    """All exponents are ln 0.5: the matrix is one Jordan block, to which they converge slowly."""
    problem, theta = ug.problems.influence_balancing(horizon=600)
    found = lyapunov(problem, theta, key=KEY, num_exponents=23)
    assert abs(float(found.exponents.sum()) / (23 * math.log(0.5)) - 1) < 1e-5
    assert np.all(np.abs(found.exponents - math.log(0.5)) < 22 * math.log(600) / 600)


def test_reproducible_steps():
    """Two runs that differ by a rounding error separate when it is said, and not before."""
    problem, theta = ug.problems.chaotic_map(horizon=2000)
    found = lyapunov(problem, theta, key=KEY)
    steps = found.reproducible_steps
    assert abs(steps["float32"] - 24 * LN2 / found.exponents[0]) < 1e-3
    assert steps["float64"] > steps["float32"] > steps["tf32"] > steps["bfloat16"]
    step, (start, t) = episode_map(problem, theta, key=KEY)

    def apart(state, _):
        state = jax.vmap(step, in_axes=((0, None),), out_axes=(0, None))(state)
        return state, jnp.abs(state[0][1] - state[0][0])

    pair = start * jnp.array([1, 1 + 2.0**-23])
    _, distance = jax.jit(lambda x: jax.lax.scan(apart, (x, t), length=60))(pair)
    reached = int(np.argmax(distance > 0.1))
    assert 0.5 * steps["float32"] < reached < 1.5 * steps["float32"]
    stable = found._replace(exponents=-found.exponents)
    assert stable.reproducible_steps["float32"] == np.inf


def test_derivatives_of_the_exponent():
    """In float64, by ``grad`` and ``jvp``, as finite differences; zero at the top of a barrier."""

    def exponents(start, rate):
        def step(x):
            return x - rate * (x**3 - x)  # the double well V = x^4/4 - x^2/2, and a skew plane

        def skew(s):
            return jnp.stack([step(s[0]) + 0.1 * s[1], 0.3 * s[0] * s[1] + 0.5 * jnp.sin(s[1])])

        one = lyapunov_of_map(step, start, 5).exponents[0]
        two = lyapunov_of_map(skew, jnp.stack([start, rate]), 5, num_exponents=2).exponents
        return jnp.append(two, one)

    @jax.jit
    def derivatives(start, rate):
        backwards = jax.jacrev(exponents, (0, 1))(start, rate)
        forwards = jax.jacfwd(exponents, (0, 1))(start, rate)
        h = 1e-6
        up = exponents(start + h, rate), exponents(start, rate + h)
        down = exponents(start - h, rate), exponents(start, rate - h)
        return backwards, forwards, [(a - b) / (2 * h) for a, b in zip(up, down, strict=True)]

    with jax.enable_x64(True):
        backwards, forwards, differences = derivatives(0.3, 0.2)
        np.testing.assert_allclose(backwards, forwards, rtol=1e-9)
        np.testing.assert_allclose(backwards, differences, rtol=1e-6, atol=1e-8)
        backwards, _, _ = derivatives(0.0, 0.2)
        assert abs(backwards[0][2]) < 1e-12
        np.testing.assert_allclose(jax.jit(exponents)(0.0, 0.2)[2], math.log(1.2), rtol=1e-12)


def test_derivative_with_respect_to_theta():
    problem, theta = ug.problems.influence_balancing(horizon=10)
    problem = problem._replace(step=lambda key, theta, s, t: (theta * s, s[0]))
    rate = jax.jit(jax.grad(lambda theta: lyapunov(problem, theta, key=KEY).exponents[0]))
    np.testing.assert_allclose(rate(theta), 1 / theta, rtol=1e-5)


def test_a_step_without_a_derivative():
    @jax.custom_vjp
    def halve(x):
        return x / 2

    halve.defvjp(lambda x: (halve(x), None), lambda _, g: (g / 2,))
    start = {"x": jnp.ones(2), "z": jnp.ones((), jnp.complex64), "key": KEY, "n": 3}

    def step(s):
        return {"x": halve(s["x"]), "z": 0.7j * s["z"], "key": s["key"], "n": s["n"] + 1}

    with raises(TypeError, "no forward derivative", "lyapunov_by_distance"):
        lyapunov_of_map(step, start, 5)
    found = lyapunov_by_distance(step, start, 40, num_exponents=4, discard=40)
    truth = np.log([0.7, 0.7, 0.5, 0.5])
    np.testing.assert_allclose(found.exponents, truth, atol=0.01)


def test_a_second_call_compiles_nothing():
    problem, theta = ug.problems.influence_balancing(horizon=600)
    lyapunov(problem, theta, key=KEY, num_exponents=23)
    others = theta + 1, jax.random.key(7)
    with counted() as programs:
        lyapunov(problem, others[0], key=others[1], num_exponents=23)
    assert programs == [0]


def test_errors():
    problem, theta = ug.problems.influence_balancing(horizon=10)
    with raises(ValueError, "num_exponents", "24 for 23"):
        lyapunov(problem, theta, key=KEY, num_exponents=24)
    with raises(ValueError, "`discard`=10", "horizon of 10"):
        lyapunov(problem, theta, key=KEY, discard=10)
    with raises(ValueError, "num_steps", "sampled"):
        lyapunov(problem._replace(horizon=lambda key: 5), theta, key=KEY)
    with raises(TypeError, "it changed", "float32"):
        lyapunov_of_map(lambda s: s.astype(jnp.float16), jnp.ones(2), 3)
    with raises(ValueError, "1 for 0"):
        lyapunov_of_map(lambda s: s + 1, 3, 3)
    with raises(ValueError, "distance", "2"):
        lyapunov_by_distance(lambda s: s, 1.0, 3, distance=2)
    many = jax.tree.map(lambda x: x[None], ug.diagnostics.Lyapunov(*4 * [jnp.ones(1)]))
    with raises(ValueError, "several trajectories"):
        many.table()

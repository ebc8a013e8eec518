"""``root``, ``fixed_point``, ``argmin``, ``one_step``: derivatives of solutions."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

from tests.helpers import raises
from tests.quadratics import ridge
from unrollgrad import implicit

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def _newton(optimality, steps=30):
    """A solver for ``optimality(x, *args) = 0`` of vectors, in a while loop."""

    def solve(init, *args):
        def turn(state):
            i, x = state
            jacobian = jax.jacobian(optimality)(x, *args)
            return i + 1, x - jnp.linalg.solve(jacobian, optimality(x, *args))

        return jax.lax.while_loop(lambda s: s[0] < steps, turn, (0, init))[1]

    return solve


def _system(x, a):
    """A root that is not symmetric and not linear in anything."""
    return jnp.array([x[0] + 0.3 * jnp.sin(x[1]) - a[0] ** 2, x[1] ** 3 + x[1] + x[0] - a[1]])


def _differences(f, a, epsilon=1e-5):
    columns = [(f(a + epsilon * e) - f(a - epsilon * e)) / (2 * epsilon) for e in jnp.eye(a.size)]
    return jnp.stack(columns, -1)


@pytest.mark.parametrize("under", ["plain", "jit", "vmap"])
def test_root_forwards_backwards_and_twice(under):
    solve = implicit.root(_system)(_newton(_system))
    a = jnp.array([0.7, 1.3])

    def solution(a):
        return solve(jnp.ones(2), a)

    if under == "jit":
        solution = jax.jit(solution)
    np.testing.assert_allclose(_system(solution(a), a), 0, atol=1e-12)
    jacobian = _differences(solution, a)
    hessian = _differences(jax.jacrev(solution), a)
    kinds = {
        "jacfwd": (jax.jacfwd(solution), jacobian),
        "jacrev": (jax.jacrev(solution), jacobian),
        "hessian": (jax.hessian(solution), hessian),
        "reverse twice": (jax.jacrev(jax.jacrev(solution)), hessian),
        "forward twice": (jax.jacfwd(jax.jacfwd(solution)), hessian),
        "reverse of forward": (jax.jacrev(jax.jacfwd(solution)), hessian),
    }
    for name, (derivative, truth) in kinds.items():
        if under == "vmap":
            got = jax.jit(jax.vmap(derivative))(jnp.stack([a, a + 0.1]))[0]
        else:
            got = derivative(a)
        np.testing.assert_allclose(got, truth, rtol=1e-6, atol=1e-7, err_msg=name)


def test_the_initial_guess_has_no_gradient():
    solve = implicit.root(_system)(_newton(_system))
    a = jnp.array([0.7, 1.3])
    gradient = jax.grad(lambda init: jnp.sum(solve(init, a)))(jnp.ones(2))
    assert not gradient.any()


def test_closed_over_arrays_have_derivatives():
    """In the optimality, in the solver, and differentiated, batched or compiled outside."""

    def outer(shift, a):
        def optimality(x, a):
            return _system(x, a) + 0.1 * shift * x

        return jnp.sum(implicit.root(optimality)(_newton(optimality))(jnp.ones(2), a) ** 2)

    shift, a = jnp.float64(0.5), jnp.array([0.7, 1.3])
    truth = (outer(shift + 1e-5, a) - outer(shift - 1e-5, a)) / 2e-5
    for gradient in (
        jax.grad(outer)(shift, a),
        jax.jit(jax.grad(outer))(shift, a),
        jax.jvp(lambda s: outer(s, a), (shift,), (1.0,))[1],
        jax.vmap(jax.grad(outer), (0, None))(jnp.stack([shift, shift]), a)[0],
        jax.grad(lambda s: jnp.sum(jax.vmap(outer, (None, 0))(s, a[None])))(shift),
    ):
        np.testing.assert_allclose(gradient, truth, rtol=1e-7)


def test_a_number_that_is_closed_over_and_no_arguments():
    def outer(a):
        return implicit.root(lambda x: x**2 - a)(lambda init: jnp.sqrt(a))(1.0)

    for a in (4.0, jnp.float64(4.0)):
        np.testing.assert_allclose(jax.jvp(outer, (a,), (1.0,))[1], 0.25, rtol=1e-9)
        np.testing.assert_allclose(jax.hessian(outer)(a), -1 / 32, rtol=1e-9)
        np.testing.assert_allclose(jax.jacfwd(jax.jacfwd(outer))(a), -1 / 32, rtol=1e-9)


def test_second_derivatives_in_a_scan():
    """jax before 0.12 loses the rule in reverse over reverse, as the docstring says."""
    root = implicit.root(lambda x, a: x**2 - a)(lambda init, a: jnp.sqrt(a))

    def scanned(a):
        return jax.lax.scan(lambda c, _: (root(1.0, c), None), a, length=2)[0]

    truth = -3 / 16 * 16.0 ** (-7 / 4)
    np.testing.assert_allclose(jax.grad(scanned)(16.0), 16.0 ** (-3 / 4) / 4, rtol=1e-9)
    np.testing.assert_allclose(jax.jacfwd(jax.jacfwd(scanned))(16.0), truth, rtol=1e-9)
    if jax.__version_info__ >= (0, 12):
        for second in (jax.hessian(scanned), jax.grad(jax.grad(scanned))):
            np.testing.assert_allclose(second(16.0), truth, rtol=1e-9)


def test_the_default_solver_on_a_larger_system():
    matrix = 3 * jax.random.normal(jax.random.key(0), (50, 50)) / 50**0.5
    solve = implicit.root(lambda x, a: matrix @ x - a)(lambda init, a: jnp.linalg.solve(matrix, a))
    got = jax.jacrev(solve, 1)(jnp.zeros(50), jnp.ones(50))
    inverse = jnp.linalg.inv(matrix)
    assert jnp.linalg.norm(got - inverse) < 1e-6 * jnp.linalg.norm(inverse)


def test_arguments_of_all_kinds():
    """Trees, keyword arguments, ints, keys, functions; and aux."""

    def optimality(x, theta, key, *, power, activation):
        noise = jax.random.normal(key, x["w"].shape)
        return {
            "w": x["w"] + activation(x["b"]) - theta["w"] * noise,
            "b": x["b"] * power - jnp.sum(x["w"]) - theta["b"],
        }

    @implicit.root(optimality, has_aux=True)
    def solve(init, theta, key, *, power, activation):
        def turn(i, x):
            out = optimality(x, theta, key, power=power, activation=activation)
            return jax.tree.map(lambda x, r: x - 0.2 * r, x, out)

        return jax.lax.fori_loop(0, 500, turn, init), {"steps": 500}

    init = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    theta = {"w": jnp.array([1.0, -0.5]), "b": jnp.float64(0.3)}

    def value(theta):
        x, aux = solve(init, theta, jax.random.key(0), power=3, activation=jnp.tanh)
        assert aux["steps"] == 500
        return jnp.sum(x["w"]) + x["b"] ** 2

    gradient = jax.grad(value)(theta)
    step = 1e-5
    up = value({"w": theta["w"], "b": theta["b"] + step})
    down = value({"w": theta["w"], "b": theta["b"] - step})
    np.testing.assert_allclose(gradient["b"], (up - down) / (2 * step), rtol=1e-6)
    assert jax.tree.structure(gradient) == jax.tree.structure(theta)


def test_a_part_that_theta_does_not_reach():
    """Equations in which theta does not appear, forwards, backwards and twice."""

    def optimality(x, a):
        return {"u": x["u"] - a**2, "v": 2 * x["v"] - x["u"], "w": x["w"] - 1.0}

    @implicit.root(optimality)
    def solve(init, a):
        return {"u": a**2, "v": a**2 / 2, "w": jnp.ones(())}

    def value(a):
        x = solve({"u": 0.0, "v": 0.0, "w": 0.0}, a)
        return x["u"] * x["v"] + x["w"]

    for order, truth in enumerate([1.5**4 / 2 + 1, 2 * 1.5**3, 6 * 1.5**2, 12 * 1.5]):
        for mode in (jax.jacfwd, jax.jacrev):
            f = value
            for _ in range(order):
                f = mode(f)
            f = jax.jit(f) if order > 1 else f  # op by op they take half a minute
            np.testing.assert_allclose(f(1.5), truth, rtol=1e-9)


def test_argmin_is_the_hypergradient():
    problem = ridge()

    @implicit.argmin(problem.inner, solver=lx.CG(**TIGHT))
    def solve(init, theta):
        gradient = jax.grad(problem.inner)
        return init - jnp.linalg.solve(
            jax.hessian(problem.inner)(init, theta), gradient(init, theta)
        )

    def outer(theta):
        return problem.outer(solve(jnp.zeros(8), theta), theta)

    np.testing.assert_allclose(jax.grad(outer)(problem.theta), problem.exact, rtol=1e-9)
    hessian = jax.jit(jax.hessian(outer))(problem.theta)
    np.testing.assert_allclose(
        hessian, _differences(jax.grad(outer), problem.theta), rtol=1e-5, atol=1e-9
    )
    default = implicit.argmin(problem.inner)(solve.__wrapped__)
    forward = jax.jacfwd(lambda theta: problem.outer(default(jnp.zeros(8), theta), theta))
    np.testing.assert_allclose(forward(problem.theta), problem.exact, rtol=1e-7)


def test_a_truncated_solve_differentiates():
    """Few terms: no error, Neumann's bias, the same forwards and backwards, and twice."""
    problem, alpha = ridge(), 0.3
    inverse = alpha * sum(
        jnp.linalg.matrix_power(jnp.eye(8) - alpha * problem.hessian, j) for j in range(3)
    )
    mixed = jax.jacobian(jax.grad(problem.inner), 1)(problem.params, problem.theta)

    for solver, truth in (
        (implicit.neumann(3, alpha), -inverse @ mixed),
        (lx.CG(rtol=1e-10, atol=1e-10, max_steps=3), None),
        (lx.GMRES(rtol=1e-10, atol=1e-10, max_steps=1), None),
    ):
        solve = implicit.argmin(problem.inner, solver=solver)(lambda init, theta: problem.params)
        forward = jax.jacfwd(solve, 1)(jnp.zeros(8), problem.theta)
        backward = jax.jacrev(solve, 1)(jnp.zeros(8), problem.theta)
        if truth is not None:
            np.testing.assert_allclose(forward, truth, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(backward, truth, rtol=1e-9, atol=1e-12)
        second = jax.hessian(lambda theta: jnp.sum(solve(jnp.zeros(8), theta) ** 2))  # noqa: B023
        for x in (forward, backward, jax.jit(second)(problem.theta)):
            assert jnp.isfinite(x).all()


def _lasso_step(w, penalty, x, y, rate=0.2):
    gradient = x.T @ (x @ w - y) / len(y)
    moved = w - rate * gradient
    return jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - rate * penalty, 0)


def _iterated(step, number=3000):
    def solve(init, *args):
        return jax.lax.fori_loop(0, number, lambda i, w: step(w, *args), init)

    return solve


def test_the_lasso():
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = jax.random.normal(keys[0], (30, 6)), jax.random.normal(keys[1], (30,))
    solve = implicit.fixed_point(_lasso_step)(_iterated(_lasso_step))
    penalty = 0.15
    w = solve(jnp.zeros(6), penalty, x, y)
    active = np.flatnonzero(w)
    assert 0 < active.size < 6
    # On its support the solution is linear in the penalty.
    gram = x[:, active].T @ x[:, active] / 30
    truth = np.zeros(6)
    truth[active] = -np.linalg.solve(gram, np.sign(w[active]))
    for mode in (jax.jacfwd, jax.jacrev):
        got = mode(lambda p: solve(jnp.zeros(6), p, x, y))(penalty)
        np.testing.assert_allclose(got, truth, rtol=1e-7, atol=1e-10)


def test_a_box():
    keys = jax.random.split(jax.random.key(1), 2)
    x, y = jax.random.normal(keys[0], (30, 6)), jax.random.normal(keys[1], (30,))

    def step(w, bound, x, y):
        moved = w - 0.2 * x.T @ (x @ w - y) / 30
        return optax.projections.projection_box(moved, -bound, bound)

    solve = implicit.fixed_point(step)(_iterated(step))
    w = solve(jnp.zeros(6), 0.1, x, y)
    free = np.flatnonzero(jnp.abs(w) < 0.1 - 1e-9)
    at_bound = np.setdiff1d(np.arange(6), free)
    assert free.size
    assert at_bound.size
    truth = np.zeros(6)
    truth[at_bound] = np.sign(w[at_bound])
    gram = x.T @ x / 30
    truth[free] = -np.linalg.solve(
        gram[np.ix_(free, free)], gram[np.ix_(free, at_bound)] @ truth[at_bound]
    )
    for mode in (jax.jacfwd, jax.jacrev):
        got = mode(lambda b: solve(jnp.zeros(6), b, x, y))(0.1)
        np.testing.assert_allclose(got, truth, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_the_last_steps(num_steps):
    """Neumann's sum exactly, and within the bound of the error."""
    problem, alpha = ridge(), 0.3

    def step(w, theta):
        return w - alpha * jax.grad(problem.inner)(w, theta)

    solve = implicit.one_step(step, num_steps=num_steps)(lambda init, theta: problem.params)
    forward = jax.jacfwd(solve, 1)(jnp.zeros(8), problem.theta)
    backward = jax.jacrev(solve, 1)(jnp.zeros(8), problem.theta)
    np.testing.assert_allclose(forward, backward, rtol=1e-10, atol=1e-13)
    series = implicit.fixed_point(step, solver=implicit.neumann(num_steps, 1.0))
    same = jax.jacrev(series(lambda init, theta: problem.params), 1)(jnp.zeros(8), problem.theta)
    np.testing.assert_allclose(forward, same, rtol=1e-9, atol=1e-12)

    exact = jax.jacrev(implicit.fixed_point(step)(lambda init, theta: problem.params), 1)
    contraction = jnp.eye(8) - alpha * problem.hessian
    q = jnp.linalg.norm(contraction, 2)
    moved = jnp.linalg.norm(jax.jacobian(step, 1)(problem.params, problem.theta), 2)
    error = jnp.linalg.norm(forward - exact(jnp.zeros(8), problem.theta), 2)
    assert q < 1
    assert 1e-6 < error <= q**num_steps / (1 - q) * moved


def test_one_step_of_newton_is_exact():
    problem = ridge()

    def step(w, theta):
        gradient = jax.grad(problem.inner)
        return w - jnp.linalg.solve(jax.hessian(problem.inner)(w, theta), gradient(w, theta))

    solve = implicit.one_step(step)(lambda init, theta: problem.params)
    gradient = jax.grad(lambda t: problem.outer(solve(jnp.zeros(8), t), t))(problem.theta)
    np.testing.assert_allclose(gradient, problem.exact, rtol=1e-9)


def test_mixed_dtypes():
    def objective(x, theta):
        rest = jnp.sum((x["b"].astype(jnp.float32) - theta["b"]) ** 2)
        return jnp.sum((x["a"] - theta["a"].astype(jnp.float64)) ** 2) + rest

    @implicit.argmin(objective)
    def solve(init, theta):
        return {"a": theta["a"].astype(jnp.float64), "b": theta["b"].astype(jnp.bfloat16)}

    theta = {"a": jnp.bfloat16([1.0, 2.0]), "b": jnp.float32([3.0])}
    gradient = jax.grad(
        lambda theta: sum(
            jnp.sum(x.astype(jnp.float64)) for x in jax.tree.leaves(solve(None, theta))
        )
    )(theta)
    assert gradient["a"].dtype == jnp.bfloat16
    assert gradient["b"].dtype == jnp.float32
    np.testing.assert_allclose(gradient["a"].astype(float), 1, rtol=1e-2)
    np.testing.assert_allclose(gradient["b"], 1, rtol=1e-2)


def test_a_solver_outside_jax():
    """Any Python, as long as it is not traced."""

    @implicit.root(lambda x, a: x**3 - a)
    def cube_root(init, a):
        return jnp.asarray(float(a) ** (1 / 3))

    np.testing.assert_allclose(jax.grad(cube_root, 1)(0.0, 8.0), 1 / 12, rtol=1e-9)


def test_errors():
    with raises(TypeError, "`optimality`", "function"):
        implicit.root(3.0)
    with raises(TypeError, "`step`", "function"):
        implicit.one_step(None)
    with raises(ValueError, "`num_steps`", "0"):
        implicit.one_step(lambda x: x, num_steps=0)
    wrong = implicit.root(lambda x, a: {"u": x["u"] - a, "w": x["u"]})(lambda init, a: init)
    with raises(TypeError, "`optimality`", "like params", "['v']"):
        wrong({"u": jnp.ones(2), "v": jnp.ones(2)}, 1.0)
    shape = implicit.fixed_point(lambda x, a: jnp.sum(x) * a)(lambda init, a: init)
    with raises(TypeError, "`step`", "(2,)"):
        shape(jnp.ones(2), 1.0)
    counter = implicit.root(lambda x, a: x)(lambda init, a: init)
    with raises(TypeError, "params['n']", "int"):
        counter({"n": jnp.arange(3)}, 1.0)

"""``root``, ``fixed_point``, ``argmin``, ``one_step``: derivatives of solutions."""

import functools

import chex
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

from tests.helpers import mistyped, numbers, raises
from tests.quadratics import ridge
from unrollgrad import implicit

TIGHT = {"rtol": 1e-12, "atol": 1e-12}

A = np.array([0.7, 1.3])


def _newton(optimality, steps=30):
    """A Newton solver for ``optimality(x, *args) = 0`` in a while loop; x is a vector."""

    def solve(init, *args):
        def turn(state):
            i, x = state
            jacobian = jax.jacobian(optimality)(x, *args)
            return i + 1, x - jnp.linalg.solve(jacobian, optimality(x, *args))

        return jax.lax.while_loop(lambda s: s[0] < steps, turn, (0, init))[1]

    return solve


def _system(x, a):
    """A root whose Jacobian is not symmetric; no argument enters linearly."""
    return jnp.array([x[0] + 0.3 * jnp.sin(x[1]) - a[0] ** 2, x[1] ** 3 + x[1] + x[0] - a[1]])


def _known(a):
    """The system's root and its Jacobian, in NumPy."""
    x = np.ones(2)
    for _ in range(50):
        slope = np.array([[1, 0.3 * np.cos(x[1])], [1, 3 * x[1] ** 2 + 1]])
        system = [x[0] + 0.3 * np.sin(x[1]) - a[0] ** 2, x[1] ** 3 + x[1] + x[0] - a[1]]
        x = x - np.linalg.solve(slope, system)
    return x, np.linalg.solve(slope, np.diag([2 * a[0], 1.0]))


def _differences(f, a, epsilon=1e-5):
    columns = [(f(a + epsilon * e) - f(a - epsilon * e)) / (2 * epsilon) for e in np.eye(a.size)]
    return np.stack(columns, -1)


@pytest.mark.parametrize("under", ["jit", "vmap"])
def test_root_forwards_backwards_and_twice(under):
    """The default solver alone; a solver that compiles faster in a batch, in all orders."""
    solver = None if under == "jit" else implicit.dense()
    solve = implicit.root(_system, solver=solver)(_newton(_system))

    def solution(a):
        return solve(jnp.ones(2), a)

    def derivatives(a):
        found = {
            "value": solution(a),
            "jacfwd": jax.jacfwd(solution)(a),
            "jacrev": jax.jacrev(solution)(a),
            "hessian": jax.hessian(solution)(a),
        }
        if under == "jit":
            return found
        return found | {
            "reverse twice": jax.jacrev(jax.jacrev(solution))(a),
            "forward twice": jax.jacfwd(jax.jacfwd(solution))(a),
            "reverse of forward": jax.jacrev(jax.jacfwd(solution))(a),
        }

    if under == "vmap":
        batch = [A, A + 0.1]
        both = jax.jit(jax.vmap(derivatives))(np.stack(batch))
        all_found = [(a, jax.tree.map(lambda x: x[i], numbers(both))) for i, a in enumerate(batch)]  # noqa: B023
    else:
        all_found = [(A, jax.jit(derivatives)(A))]
    for a, found in all_found:
        root, jacobian = _known(a)
        hessian = _differences(lambda a: _known(a)[1], a)
        truths = dict.fromkeys(found, hessian)
        truths |= {"value": root, "jacfwd": jacobian, "jacrev": jacobian}
        for name, truth in truths.items():
            np.testing.assert_allclose(found[name], truth, rtol=1e-6, atol=1e-7, err_msg=name)


def test_the_initial_guess_has_no_gradient():
    solve = implicit.root(_system)(_newton(_system))
    gradient = jax.jit(jax.grad(lambda init: jnp.sum(solve(init, A))))(np.ones(2))
    assert not np.any(gradient)


def test_closed_over_arrays_have_derivatives():
    """Arrays closed over by the optimality or the solver; transformations outside."""

    def outer(shift, a):
        def optimality(x, a):
            return _system(x, a) + 0.1 * shift * x

        root = implicit.root(optimality, solver=implicit.dense())
        return jnp.sum(root(_newton(optimality))(jnp.ones(2), a) ** 2)

    @jax.jit
    def gradients(shift, a):
        return [
            jax.grad(outer)(shift, a),
            jax.jit(jax.grad(outer))(shift, a),
            jax.jvp(lambda s: outer(s, a), (shift,), (1.0,))[1],
            jax.vmap(jax.grad(outer), (0, None))(jnp.stack([shift, shift]), a)[0],
            jax.grad(lambda s: jnp.sum(jax.vmap(outer, (None, 0))(s, a[None])))(shift),
        ]

    value = jax.jit(outer)
    truth = float(value(0.5 + 1e-5, A) - value(0.5 - 1e-5, A)) / 2e-5
    np.testing.assert_allclose(gradients(0.5, A), truth, rtol=1e-7)


def test_a_number_that_is_closed_over_and_no_arguments():
    def outer(a):
        root = implicit.root(lambda x: x**2 - a, solver=implicit.dense())
        return root(lambda init: jnp.sqrt(a))(1.0)

    def derivatives(a):
        first = jax.jvp(outer, (a,), (1.0,))[1]
        return first, jax.hessian(outer)(a), jax.jacfwd(jax.jacfwd(outer))(a)

    for found in jax.jit(lambda a: [derivatives(4.0), derivatives(a)])(jnp.float64(4.0)):
        np.testing.assert_allclose(found, [0.25, -1 / 32, -1 / 32], rtol=1e-9)


def test_second_derivatives_in_a_scan():
    """As documented, jax before 0.12 loses the rule in reverse over reverse."""
    decorate = implicit.root(lambda x, a: x**2 - a, solver=implicit.dense())
    root = decorate(lambda init, a: jnp.sqrt(a))

    def scanned(a):
        return jax.lax.scan(lambda c, _: (root(1.0, c), None), a, length=2)[0]

    @jax.jit
    def derivatives(a):
        found = {"first": jax.grad(scanned)(a), "forwards": jax.jacfwd(jax.jacfwd(scanned))(a)}
        if jax.__version_info__ >= (0, 12):
            found |= {"hessian": jax.hessian(scanned)(a), "grad": jax.grad(jax.grad(scanned))(a)}
        return found

    truth = -3 / 16 * 16.0 ** (-7 / 4)
    for name, found in derivatives(16.0).items():
        expected = 16.0 ** (-3 / 4) / 4 if name == "first" else truth
        np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=name)


def test_the_default_solver_on_a_larger_system():
    matrix = 3 * np.random.default_rng(0).normal(size=(50, 50)) / 50**0.5
    solve = implicit.root(lambda x, a: matrix @ x - a)(lambda init, a: jnp.linalg.solve(matrix, a))
    got = jax.jit(jax.jacrev(solve, 1))(np.zeros(50), np.ones(50))
    inverse = np.linalg.inv(matrix)
    assert np.linalg.norm(got - inverse) < 1e-6 * np.linalg.norm(inverse)


def test_arguments_of_all_kinds():
    """Arguments may be trees, keyword arguments, ints, keys and functions; aux is returned."""

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

    init = {"w": np.zeros(2), "b": np.zeros(())}
    theta = {"w": np.array([1.0, -0.5]), "b": np.float64(0.3)}

    def value(theta):
        x, aux = solve(init, theta, jax.random.key(0), power=3, activation=jnp.tanh)
        assert aux["steps"] == 500
        return jnp.sum(x["w"]) + x["b"] ** 2

    both = jax.jit(jax.value_and_grad(value))
    gradient, step = both(theta)[1], 1e-5
    up, down = (both({**theta, "b": theta["b"] + sign * step})[0] for sign in (1, -1))
    np.testing.assert_allclose(gradient["b"], float(up - down) / (2 * step), rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, theta)


def test_a_part_that_theta_does_not_reach():
    """Some equations do not contain theta: derivatives forwards, backwards and twice."""

    def optimality(x, a):
        return {"u": x["u"] - a**2, "v": 2 * x["v"] - x["u"], "w": x["w"] - 1.0}

    @implicit.root(optimality, solver=implicit.dense())
    def solve(init, a):
        return {"u": a**2, "v": a**2 / 2, "w": jnp.ones(())}

    def value(a):
        x = solve({"u": 0.0, "v": 0.0, "w": 0.0}, a)
        return x["u"] * x["v"] + x["w"]

    @jax.jit
    def derivatives(a):
        found = []
        for mode in (jax.jacfwd, jax.jacrev):
            first, second = mode(value), mode(mode(value))
            found.append(jnp.stack([value(a), first(a), second(a), mode(second)(a)]))
        return found

    truth = [1.5**4 / 2 + 1, 2 * 1.5**3, 6 * 1.5**2, 12 * 1.5]
    for found in derivatives(1.5):
        np.testing.assert_allclose(found, truth, rtol=1e-9)


def test_argmin_is_the_hypergradient():
    problem = ridge()

    def solve(init, theta):
        gradient = jax.grad(problem.inner)
        return init - jnp.linalg.solve(
            jax.hessian(problem.inner)(init, theta), gradient(init, theta)
        )

    given = implicit.argmin(problem.inner, solver=lx.CG(**TIGHT))(solve)
    default = implicit.argmin(problem.inner)(solve)
    start = np.zeros(8)

    def outer(theta):
        return problem.outer(given(start, theta), theta)

    @jax.jit
    def derivatives(theta):
        forward = jax.jacfwd(lambda theta: problem.outer(default(start, theta), theta))(theta)
        return jax.grad(outer)(theta), forward, jax.hessian(outer)(theta)

    gradient, forward, hessian = derivatives(problem.theta)
    np.testing.assert_allclose(gradient, problem.exact, rtol=1e-9)
    np.testing.assert_allclose(forward, problem.exact, rtol=1e-7)
    differences = _differences(lambda theta: derivatives(theta)[0], problem.theta)
    np.testing.assert_allclose(hessian, differences, rtol=1e-5, atol=1e-9)


def test_a_truncated_solve_differentiates():
    """Few terms raise no error and have Neumann's bias, forwards, backwards and twice."""
    problem, alpha = ridge(), 0.3
    factor = np.eye(8) - alpha * problem.hessian
    inverse = alpha * sum(np.linalg.matrix_power(factor, j) for j in range(3))
    truth = -inverse * np.exp(problem.theta) * problem.params  # B is diagonal
    solvers = {
        "neumann": implicit.neumann(3, alpha),
        "CG": lx.CG(rtol=1e-10, atol=1e-10, max_steps=3),
        "GMRES": lx.GMRES(rtol=1e-10, atol=1e-10, max_steps=1),
    }

    @jax.jit
    def derivatives(theta):
        found, start = {}, jnp.zeros(8)
        for name, solver in solvers.items():
            solve = implicit.argmin(problem.inner, solver=solver)(lambda *_: problem.params)
            square = jax.hessian(lambda theta: jnp.sum(solve(start, theta) ** 2))  # noqa: B023
            found[name] = [square(theta)]
            if name == "neumann":
                found[name] += [
                    jax.jacfwd(solve, 1)(start, theta),
                    jax.jacrev(solve, 1)(start, theta),
                ]
        return found

    found = derivatives(problem.theta)
    chex.assert_tree_all_finite(found)
    for jacobian in found["neumann"][1:]:
        np.testing.assert_allclose(jacobian, truth, rtol=1e-9, atol=1e-12)


def _lasso_step(w, penalty, x, y, rate=0.2):
    gradient = x.T @ (x @ w - y) / len(y)
    moved = w - rate * gradient
    return jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - rate * penalty, 0)


def _box_step(w, bound, x, y):
    moved = w - 0.2 * x.T @ (x @ w - y) / 30
    return optax.projections.projection_box(moved, -bound, bound)


@functools.cache
def _fixed_point(step, number):
    """The data, the fixed point, and its derivative forwards and backwards."""
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(30, 6)), draws.normal(size=(30,))

    @implicit.fixed_point(step)
    def solve(init, *args):
        return jax.lax.fori_loop(0, 3000, lambda i, w: step(w, *args), init)

    def solution(number):
        return solve(jnp.zeros(6), number, x, y)

    @jax.jit
    def found(number):
        return solution(number), jax.jacfwd(solution)(number), jax.jacrev(solution)(number)

    return (x, y), numbers(found(number))


def test_the_lasso():
    (x, _), (w, *jacobians) = _fixed_point(_lasso_step, 0.15)
    active = np.flatnonzero(w)
    assert 0 < active.size < 6
    # On its support the solution is linear in the penalty.
    gram = x[:, active].T @ x[:, active] / 30
    truth = np.zeros(6)
    truth[active] = -np.linalg.solve(gram, np.sign(w[active]))
    for got in jacobians:
        np.testing.assert_allclose(got, truth, rtol=1e-7, atol=1e-10)


def test_a_box():
    (x, _), (w, *jacobians) = _fixed_point(_box_step, 0.1)
    free = np.flatnonzero(np.abs(w) < 0.1 - 1e-9)
    at_bound = np.setdiff1d(np.arange(6), free)
    assert free.size
    assert at_bound.size
    truth = np.zeros(6)
    truth[at_bound] = np.sign(w[at_bound])
    gram = x.T @ x / 30
    truth[free] = -np.linalg.solve(
        gram[np.ix_(free, free)], gram[np.ix_(free, at_bound)] @ truth[at_bound]
    )
    for got in jacobians:
        np.testing.assert_allclose(got, truth, rtol=1e-7, atol=1e-10)


@functools.cache
def _last_steps():
    """Jacobians of the last steps of descent, of a series as long, and of all steps."""
    problem, alpha = ridge(), 0.3

    def step(w, theta):
        return w - alpha * jax.grad(problem.inner)(w, theta)

    def solve(init, theta):
        return problem.params

    @jax.jit
    def jacobians(theta):
        def reverse(decorate):
            return jax.jacrev(decorate(solve), 1)(jnp.zeros(8), theta)

        found = {"exact": reverse(implicit.fixed_point(step))}
        found["of a step"] = jax.jacobian(step, 1)(problem.params, theta)
        for k in (1, 2, 4, 8):
            decorate = implicit.one_step(step, num_steps=k)
            forward = jax.jacfwd(decorate(solve), 1)(jnp.zeros(8), theta)
            found[f"{k} steps"] = forward, reverse(decorate)
            series = implicit.neumann(k, 1.0)
            found[f"{k} terms"] = reverse(implicit.fixed_point(step, solver=series))
        return found

    return numbers(jacobians(problem.theta))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_the_last_steps(num_steps):
    """The last steps equal Neumann's sum exactly; the error is within its bound."""
    found = _last_steps()
    forward, backward = found[f"{num_steps} steps"]
    np.testing.assert_allclose(forward, backward, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(forward, found[f"{num_steps} terms"], rtol=1e-9, atol=1e-12)
    q = np.linalg.norm(np.eye(8) - 0.3 * ridge().hessian, 2)
    error = np.linalg.norm(forward - found["exact"], 2)
    assert q < 1
    moved = np.linalg.norm(found["of a step"], 2)
    assert 1e-6 < error <= q**num_steps / (1 - q) * moved


def test_one_step_of_newton_is_exact():
    problem = ridge()

    def step(w, theta):
        gradient = jax.grad(problem.inner)
        return w - jnp.linalg.solve(jax.hessian(problem.inner)(w, theta), gradient(w, theta))

    solve = implicit.one_step(step)(lambda init, theta: problem.params)
    gradient = jax.jit(jax.grad(lambda t: problem.outer(solve(jnp.zeros(8), t), t)))(problem.theta)
    np.testing.assert_allclose(gradient, problem.exact, rtol=1e-9)


def test_mixed_dtypes():
    def objective(x, theta):
        rest = jnp.sum((x["b"].astype(jnp.float32) - theta["b"]) ** 2)
        return jnp.sum((x["a"] - theta["a"].astype(jnp.float64)) ** 2) + rest

    @implicit.argmin(objective)
    def solve(init, theta):
        return {"a": theta["a"].astype(jnp.float64), "b": theta["b"].astype(jnp.bfloat16)}

    def total(theta):
        return sum(jnp.sum(x.astype(jnp.float64)) for x in jax.tree.leaves(solve(None, theta)))

    theta = {"a": np.array([1.0, 2.0], jnp.bfloat16), "b": np.array([3.0], np.float32)}
    gradient = jax.jit(jax.grad(total))(theta)
    assert gradient["a"].dtype == jnp.bfloat16
    assert gradient["b"].dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(gradient["a"], float), 1, rtol=1e-2)
    np.testing.assert_allclose(gradient["b"], 1, rtol=1e-2)


def test_a_solver_outside_jax():
    """The solver may be any Python code if it is not traced."""

    @implicit.root(lambda x, a: x**3 - a)
    def cube_root(init, a):
        return jnp.asarray(float(a) ** (1 / 3))

    np.testing.assert_allclose(jax.grad(cube_root, 1)(0.0, 8.0), 1 / 12, rtol=1e-9)


def test_errors():
    with raises(TypeError, "`optimality`", "function"):
        implicit.root(mistyped(3.0))
    with raises(TypeError, "`step`", "function"):
        implicit.one_step(mistyped(None))
    with raises(ValueError, "`num_steps`", "0"):
        implicit.one_step(lambda x: x, num_steps=0)
    wrong = implicit.root(lambda x, a: {"u": x["u"] - a, "w": x["u"]})(lambda init, a: init)
    with raises(TypeError, "`optimality`", "like params", "['v']"):
        jax.eval_shape(wrong, {"u": jnp.ones(2), "v": jnp.ones(2)}, 1.0)
    shape = implicit.fixed_point(lambda x, a: jnp.sum(x) * a)(lambda init, a: init)
    with raises(TypeError, "`step`", "(2,)"):
        jax.eval_shape(shape, jnp.ones(2), 1.0)
    counter = implicit.root(lambda x, a: x)(lambda init, a: init)
    with raises(TypeError, "params['n']", "int"):
        counter({"n": jnp.arange(3)}, 1.0)


def test_the_equation_is_read_only_where_a_derivative_is_taken():
    calls = []

    def optimality(x, a):
        calls.append(0)
        return jnp.tanh(x) - a

    solve = implicit.root(optimality)(lambda init, a: jnp.arctanh(a))
    np.testing.assert_allclose(solve(None, 0.3), np.arctanh(0.3), rtol=1e-6)
    assert not calls
    np.testing.assert_allclose(jax.grad(solve, 1)(None, 0.3), 1 / (1 - 0.3**2), rtol=1e-5)
    assert calls


def test_what_an_equation_closes_over_is_read_in_every_call():
    data = [np.float32(2.0), np.ones(2, np.float32)]
    solve = implicit.root(lambda x, a: x - a * data[0] * data[1])(
        lambda init, a: a * data[0] * data[1]
    )

    def slope():
        return jax.grad(lambda a: jnp.sum(solve(None, a)))(1.0)

    np.testing.assert_allclose(slope(), 4.0, rtol=1e-6)
    data[0] = np.float32(3.0)
    np.testing.assert_allclose(slope(), 6.0, rtol=1e-6)
    data[1] = np.full(2, 5.0, np.float32)
    np.testing.assert_allclose(slope(), 30.0, rtol=1e-6)


SINGULAR = np.array([[0.0, 0, 0], [0.3, -1.2, 0.7], [0.9, 0.4, -0.5]])


def singular(**settings):
    """The solution of least norm of a singular linear system."""
    inverse = jnp.asarray(np.linalg.pinv(SINGULAR), jnp.float32)
    matrix = jnp.asarray(SINGULAR, jnp.float32)
    solve = implicit.root(lambda x, b: matrix @ x - b, **settings)(lambda init, b: inverse @ b)
    return lambda b: solve(None, b)


def test_a_singular_system_has_the_derivative_of_least_norm_or_none():
    inverse, b = np.linalg.pinv(SINGULAR), jnp.asarray(SINGULAR @ np.ones(3), jnp.float32)
    solve = singular()
    _, push = jax.jvp(solve, (b,), (b,))
    np.testing.assert_allclose(push, inverse @ b, atol=1e-5)
    for cotangent in np.eye(3, dtype=np.float32):
        (pull,) = jax.vjp(solve, b)[1](jnp.asarray(cotangent))
        np.testing.assert_allclose(pull, inverse.T @ cotangent, atol=1e-5)
    impossible = jnp.ones(3, jnp.float32)  # no solution moves that way
    assert np.isnan(jax.jvp(solve, (b,), (impossible,))[1]).all()


def test_a_check_raises_where_there_is_no_derivative():
    b = jnp.asarray(SINGULAR @ np.ones(3), jnp.float32)
    checked = jax.jit(
        lambda db: jax.jvp(singular(check=True, solver=implicit.dense()), (b,), (db,))[1]
    )
    np.testing.assert_allclose(checked(b), np.linalg.pinv(SINGULAR) @ b, atol=1e-5)
    with pytest.raises(Exception, match="derivative through `optimality` was not found"):
        checked(jnp.ones(3, jnp.float32)).block_until_ready()


@pytest.mark.parametrize("decorator", [implicit.root, implicit.fixed_point])
def test_solvers_for_definite_matrices(decorator):
    """d/d decay of ridge regression is (-0.2, -0.2) by hand, as in the docstring of ``argmin``."""
    x, y = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([1.0, 2.0])

    def gradient(w, decay):
        return 2 * x.T @ (x @ w - y) + 2 * decay * w

    def function(w, decay):
        return gradient(w, decay) if decorator is implicit.root else w - 0.1 * gradient(w, decay)

    def solve(init, decay):
        return jnp.linalg.solve(x.T @ x + decay * jnp.eye(2), x.T @ y)

    ways: list = [{"solver": lx.CG(1e-6, 1e-6)}, {"solver": lx.Cholesky()}]
    ways.append({"tags": lx.symmetric_tag, "solver": lx.GMRES(1e-6, 1e-6)})
    ways.append({"tags": (lx.symmetric_tag, lx.positive_semidefinite_tag)})
    for way in ways:
        slope = jax.jacobian(decorator(function, **way)(solve), 1)(jnp.zeros(2), 1.0)
        np.testing.assert_allclose(slope, [-0.2, -0.2], rtol=1e-5)


@pytest.mark.parametrize("upper", [False, True])
def test_triangular_systems(upper):
    matrix = jnp.array([[2.0, 0.0], [1.0, 4.0]])
    matrix, tag = (
        (matrix.T, lx.upper_triangular_tag) if upper else (matrix, lx.lower_triangular_tag)
    )
    solve = implicit.root(lambda x, b: matrix @ x - b, solver=lx.Triangular(), tags=tag)(
        lambda init, b: jnp.linalg.solve(matrix, b)
    )
    for derive in (jax.jacfwd, jax.jacrev):
        found = derive(solve, 1)(None, jnp.ones(2))
        np.testing.assert_allclose(found, jnp.linalg.inv(matrix), rtol=1e-6)


def test_defaults_and_names_of_the_solvers_arguments():
    def square(x, a, b):
        return x**2 - a * b

    solve = implicit.root(square)(lambda init, a, b=4.0, steps=3: jnp.sqrt(a * b))
    np.testing.assert_allclose(jax.grad(solve, 1)(1.0, 1.0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(solve, 1)(1.0, 1.0, b=9.0), 1.5, rtol=1e-6)
    turned = implicit.root(lambda x, b, a: x**2 - a / b)(lambda init, a, b: jnp.sqrt(a / b))
    found = jax.grad(lambda a: turned(1.0, a=a, b=4.0))(1.0)
    np.testing.assert_allclose(found, 0.25, rtol=1e-6)

"""``implicit.hypergradient`` against closed forms, reverse mode and its own bounds."""

import importlib

import chex
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import raises
from tests.quadratics import quadratic, ridge
from unrollgrad import implicit

TIGHT = {"rtol": 1e-11, "atol": 1e-11}

EXACT = {
    "CG": lx.CG(**TIGHT),
    "NormalCG": lx.Normal(lx.CG(**TIGHT)),
    "GMRES": lx.GMRES(**TIGHT),
    "BiCGStab": lx.BiCGStab(**TIGHT),
    "LSMR": lx.LSMR(**TIGHT),
    "neumann": implicit.neumann(500),
    "nystrom": implicit.nystrom(8, 1e-8),  # with less, rounding outgrows what it is off by
    "dense": implicit.dense(),
}


def _error(got, truth):
    return float(jnp.linalg.norm(got - truth) / jnp.linalg.norm(truth))


def _neumann_inverse(hessian, alpha, terms):
    """alpha sum_j (1 - alpha H)^j, written out."""
    factor = jnp.eye(len(hessian)) - alpha * hessian
    return alpha * sum(jnp.linalg.matrix_power(factor, j) for j in range(terms))


@pytest.mark.parametrize("name", EXACT)
def test_ridge_with_a_decay_for_each_weight(name):
    problem = ridge()
    f = implicit.hypergradient(problem.outer, problem.inner, solver=EXACT[name], check=True)
    out = f(problem.params, problem.theta)
    assert _error(out.grad, problem.exact) < 1e-6
    assert out.outer_loss == problem.outer(problem.params, problem.theta)
    assert out.info.converged
    assert out.info.residual < 1e-6
    jitted = jax.jit(f)(problem.params, problem.theta)
    np.testing.assert_allclose(jitted.grad, out.grad, rtol=1e-6)


def test_the_comparison_can_fail():
    """Few terms, the wrong sign and the direct term alone are all rejected by it."""
    problem = ridge()
    few = implicit.hypergradient(problem.outer, problem.inner, solver=implicit.neumann(3))
    assert _error(few(problem.params, problem.theta).grad, problem.exact) > 1e-2
    direct = jax.grad(problem.outer, 1)(problem.params, problem.theta)
    assert _error(direct, problem.exact) > 1e-2
    assert _error(2 * direct - problem.exact, problem.exact) > 1e-2


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_is_backpropagation_through_as_many_steps_of_gradient_descent(terms):
    problem, alpha = ridge(), 0.3

    def descend(theta, w):
        for _ in range(terms):
            w = w - alpha * jax.grad(problem.inner)(w, theta)
        return problem.outer(w, theta)

    unrolled = jax.grad(descend)(problem.theta, problem.params)
    solver = implicit.neumann(terms, alpha)
    f = implicit.hypergradient(problem.outer, problem.inner, solver=solver)
    got = f(problem.params, problem.theta).grad
    np.testing.assert_allclose(got, unrolled, rtol=1e-10, atol=1e-12)
    wrong = implicit.neumann(terms + 1, alpha)
    f = implicit.hypergradient(problem.outer, problem.inner, solver=wrong)
    assert _error(f(problem.params, problem.theta).grad, unrolled) > 1e-4
    if terms == 1:
        f = implicit.hypergradient(problem.outer, problem.inner, solver=implicit.identity(alpha))
        np.testing.assert_allclose(f(problem.params, problem.theta).grad, unrolled, rtol=1e-10)


def test_a_singular_hessian():
    """Neumann's series, damping and the pseudo-inverse agree in their limits."""
    problem = quadratic([1.0, 0.5, 0.2, 0.0, 0.0, 0.0])
    theta = jnp.ones(3)
    w = jnp.linalg.pinv(problem.hessian, hermitian=True) @ problem.mixed @ theta
    truth = (
        problem.mixed.T @ jnp.linalg.pinv(problem.hessian, hermitian=True) @ (w - problem.target)
    )

    def error(solver, damping=0.0):
        f = implicit.hypergradient(problem.outer, problem.inner, solver=solver, damping=damping)
        return _error(f(w, theta).grad, truth)

    assert error(implicit.dense()) < 1e-10
    assert error(lx.LSMR(**TIGHT)) < 1e-6
    series = [error(implicit.neumann(k, 0.8)) for k in (5, 20, 200)]
    damped = [error(lx.CG(**TIGHT), eps) for eps in (1e-1, 1e-3, 1e-6)]
    assert series[0] > series[1] > series[2]
    assert series[2] < 1e-10
    assert damped[0] > damped[1] > damped[2]
    assert damped[2] < 1e-4
    # Neumann's series is the sharper filter at the same budget, damping = 1 / (alpha K).
    assert error(implicit.neumann(20, 0.8)) < error(implicit.dense(), 1 / (0.8 * 20))


def test_damping_is_the_proximal_problem():
    problem, eps = quadratic([2.0, 1.0, 0.1]), 0.3
    theta, w = jnp.ones(3), jnp.array([0.3, -0.2, 0.5])
    a = w - problem.target
    truth = problem.mixed.T @ jnp.linalg.solve(problem.hessian + eps * jnp.eye(3), a)
    for solver in (lx.CG(**TIGHT), implicit.dense(), lx.GMRES(**TIGHT)):
        f = implicit.hypergradient(problem.outer, problem.inner, solver=solver, damping=eps)
        np.testing.assert_allclose(f(w, theta).grad, truth, rtol=1e-8)
        assert float(f(w, theta).info.residual) < 1e-8


def test_nystrom_is_the_inverse_of_its_approximation():
    eigenvalues = jnp.array([3.0, 1.0, 0.5, 0.1, 0.05, 0.01])
    problem, rho = quadratic(eigenvalues), 0.07
    vector = jnp.arange(1.0, 7.0)
    operator = lx.MatrixLinearOperator(problem.hessian)
    for rank in (1, 3, 6):
        solver = implicit.nystrom(rank, rho, key=jax.random.key(rank))
        edges = [i * 6 // rank for i in range(rank + 1)]
        key = jax.random.key(rank)
        chosen = jax.random.randint(key, (rank,), jnp.array(edges[:-1]), jnp.array(edges[1:]))
        rows = problem.hessian[chosen]
        low = rows.T @ jnp.linalg.inv(rows[:, chosen]) @ rows
        truth = jnp.linalg.solve(low + rho * jnp.eye(6), vector)
        got = lx.linear_solve(operator, vector, solver).value
        np.testing.assert_allclose(got, truth, rtol=1e-8)
        assert (_error(low, problem.hessian) < 1e-8) == (rank == 6)


def test_nystrom_on_trees():
    """Rows are found wherever they lie in a tree."""
    keys = jax.random.split(jax.random.key(0), 2)
    factor = jax.random.normal(keys[0], (7, 2))
    flat = jax.random.normal(keys[1], (7,))
    tree = {"a": flat[:3].reshape(3, 1), "b": [flat[3:5], flat[5:].reshape(1, 2)]}

    def vector(tree):
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])

    inner = lambda w, theta: jnp.sum((factor.T @ vector(w)) ** 2) / 2 - vector(w) @ theta  # noqa: E731
    outer = lambda w, theta: jnp.sum(vector(w) ** 2) / 2  # noqa: E731
    solver = implicit.nystrom(2, 1e-3, key=jax.random.key(3))
    out = implicit.hypergradient(outer, inner, solver=solver)(tree, jnp.ones(7))
    truth = jnp.linalg.solve(factor @ factor.T + 1e-3 * jnp.eye(7), flat)  # rank 2: exact
    np.testing.assert_allclose(out.grad, truth, rtol=1e-6)


def test_the_mixed_term_has_its_own_batch():
    problem = quadratic([2.0, 1.0, 0.5])
    theta, w = jnp.ones(3), jnp.ones(3)
    other = quadratic([2.0, 1.0, 0.5]).mixed * 3

    def mixed(w, theta):
        return -w @ (other @ theta)

    f = implicit.hypergradient(problem.outer, problem.inner, solver=implicit.dense(), mixed=mixed)
    truth = other.T @ jnp.linalg.solve(problem.hessian, w - problem.target)
    np.testing.assert_allclose(f(w, theta).grad, truth, rtol=1e-10)


def test_gauss_newton():
    """The Hessian where the model is linear; positive where the Hessian is not."""
    problem = ridge()
    keys = jax.random.split(jax.random.key(5), 2)
    x, y = jax.random.normal(keys[0], (9, 4)), jax.random.normal(keys[1], (9,))

    def loss(out, theta):
        return jnp.mean((out - y) ** 2) / 2

    linear = implicit.gauss_newton(lambda w, theta: x @ w, loss)(jnp.ones(4), None)
    np.testing.assert_allclose(linear.as_matrix(), x.T @ x / 9, rtol=1e-10)

    def predict(w, theta):
        return jnp.sin(3 * x @ w)

    w = jnp.ones(4)
    matrix = implicit.gauss_newton(predict, loss)(w, None).as_matrix()
    jacobian = jax.jacobian(predict)(w, None)
    np.testing.assert_allclose(matrix, jacobian.T @ jacobian / 9, rtol=1e-10, atol=1e-12)
    full = jax.hessian(lambda w: loss(predict(w, None), None))(w)
    assert jnp.linalg.eigvalsh(matrix)[0] > -1e-10 > jnp.linalg.eigvalsh(full)[0]

    def inner(w, theta):
        return loss(predict(w, None), None) + theta * jnp.sum(w)

    f = implicit.hypergradient(
        lambda w, theta: jnp.sum(w**2) / 2,
        inner,
        solver=lx.CG(**TIGHT),
        damping=0.1,
        curvature=implicit.gauss_newton(predict, loss),
    )
    truth = -jnp.sum(jnp.linalg.solve(matrix + 0.1 * jnp.eye(4), w))
    np.testing.assert_allclose(f(w, 0.5).grad, truth, rtol=1e-8)
    assert problem.hessian.shape == (8, 8)


@pytest.mark.parametrize("name", [n for n in EXACT if n != "nystrom"])
def test_an_outer_loss_that_does_not_see_the_params(name):
    """Nothing to solve: the direct term alone, and nothing is wrong."""
    f = implicit.hypergradient(
        lambda w, theta: jnp.sum(theta**2) + 0 * jnp.sum(w),
        lambda w, theta: jnp.sum((w - theta) ** 2),
        solver=EXACT[name],
        check=True,
    )
    out = f(jnp.ones(3), jnp.ones(3))
    np.testing.assert_allclose(out.grad, 2)
    assert out.info.converged


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e3])
@pytest.mark.parametrize("name", ["CG", "NormalCG", "GMRES", "LSMR", "dense"])
def test_any_units(name, scale):
    """An inner loss in large or small units, in the tolerances of single precision."""
    curvature = jnp.array([1.0, 2.0, 5.0])
    loose = {"rtol": 1e-5, "atol": 1e-5}
    solver = {"CG": lx.CG(**loose), "GMRES": lx.GMRES(**loose), "LSMR": lx.LSMR(**loose)}
    solver |= {"NormalCG": lx.Normal(lx.CG(**loose)), "dense": implicit.dense()}
    f = implicit.hypergradient(
        lambda w, theta: jnp.sum(w),
        lambda w, theta: scale * jnp.sum(curvature * w**2 / 2 - theta * w),
        solver=solver[name],
        check=True,
    )
    out = f(1 / curvature, jnp.ones(3))
    np.testing.assert_allclose(out.grad, 1 / curvature, rtol=1e-3)


def test_warm_start():
    problem = ridge()
    for solver in (lx.CG(rtol=1e-6, atol=1e-6), lx.GMRES(rtol=1e-6, atol=1e-6)):
        f = implicit.hypergradient(problem.outer, problem.inner, solver=solver)
        cold = f(problem.params, problem.theta)
        warm = f(problem.params, problem.theta + 1e-7, cold.v)
        assert int(warm.info.iterations) < int(cold.info.iterations)
        np.testing.assert_allclose(warm.grad, cold.grad, rtol=1e-4)
    f = implicit.hypergradient(problem.outer, problem.inner, solver=implicit.neumann(5, 0.3))
    v, residuals = None, []
    for _ in range(20):
        out = f(problem.params, problem.theta, v)
        v, residuals = out.v, [*residuals, float(out.info.residual)]
    assert residuals[-1] < 1e-6 < residuals[0]
    assert _error(out.grad, problem.exact) < 1e-6
    other = jax.tree.map(lambda x: x.astype(jnp.float32), v)
    with raises(TypeError, "`v0`", "float64[8]", "float32[8]"):
        f(problem.params, problem.theta, other)


def test_trees_of_mixed_dtypes():
    def inner(w, theta):
        rest = jnp.sum((w["b"].astype(jnp.float32) - theta["b"].astype(jnp.float32)) ** 2)
        return jnp.sum((w["a"] - theta["a"]) ** 2) + 2 * rest

    def outer(w, theta):
        return jnp.sum(w["a"] ** 2) + jnp.sum(w["b"].astype(jnp.float32) ** 2)

    w = {"a": jnp.float64([1.0, 2.0]), "b": jnp.bfloat16([3.0])}
    theta = {"a": jnp.float32([1.0, 2.0]), "b": jnp.bfloat16([3.0])}
    for name, solver in EXACT.items():
        if name == "nystrom":
            solver = implicit.nystrom(3, 1e-6)
        out = implicit.hypergradient(outer, inner, solver=solver)(w, theta)
        chex.assert_trees_all_equal_dtypes(out.grad, theta)
        np.testing.assert_allclose(out.grad["a"], [2.0, 4.0], rtol=1e-5)
        np.testing.assert_allclose(out.grad["b"].astype(jnp.float32), [6.0], rtol=1e-2)


@pytest.mark.parametrize("name", [name for name in EXACT if name != "LSMR"])
def test_single_precision(name):
    """float32 stays float32, also where jax has float64 enabled (lineax's LSMR fails there)."""
    problem = ridge()
    loose = {"rtol": 1e-5, "atol": 1e-5}
    solver = {
        "CG": lx.CG(**loose),
        "NormalCG": lx.Normal(lx.CG(**loose)),
        "GMRES": lx.GMRES(**loose),
        "BiCGStab": lx.BiCGStab(**loose),
        "nystrom": implicit.nystrom(8, 1e-3),
    }.get(name, EXACT[name])
    f = implicit.hypergradient(problem.outer, problem.inner, solver=solver, check=True)
    out = f(problem.params.astype(jnp.float32), problem.theta.astype(jnp.float32))
    assert out.grad.dtype == out.v.dtype == jnp.float32
    assert _error(out.grad, problem.exact) < 1e-2


def test_a_million_of_both_in_a_few_vectors():
    """10^6 weights, each with its decay: a few times the 8 MB of one, at most."""
    number = 10**6

    def inner(w, theta):
        return jnp.sum((w - 1) ** 2) / 2 + jnp.sum(jnp.exp(theta) * w**2) / 2

    def outer(w, theta):
        return jnp.sum(w**4)

    solver = lx.CG(rtol=1e-6, atol=1e-6, max_steps=20)
    f = implicit.hypergradient(outer, inner, solver=solver)
    theta = jnp.linspace(-1.0, 1.0, number)
    w = 1 / (1 + jnp.exp(theta))
    compiled = jax.jit(lambda w, theta: f(w, theta).grad).lower(w, theta).compile()
    truth = jax.grad(lambda theta: jnp.sum((1 / (1 + jnp.exp(theta))) ** 4))(theta)
    assert _error(compiled(w, theta), truth) < 1e-3
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 8 * number


@pytest.mark.parametrize("solver", ["CG", "NormalCG"])
def test_a_million_in_single_precision(solver):
    """lineax's CG alone returns NaN here: it takes curvatures below 10 for zero."""
    number, theta = 10**6, jnp.float32(0.5)
    cg = lx.CG(rtol=1e-4, atol=1e-4, max_steps=20)
    f = implicit.hypergradient(
        lambda w, theta: jnp.sum(w**2) / 2,
        lambda w, theta: (
            jnp.sum(jnp.linspace(0.5, 1.0, number, dtype=w.dtype) * w**2) / 2 - theta * jnp.sum(w)
        ),
        solver=cg if solver == "CG" else lx.Normal(cg),
    )
    curvature = np.linspace(0.5, 1.0, number)
    w = jnp.asarray(0.5 / curvature, jnp.float32)
    out = jax.jit(f)(w, theta)
    np.testing.assert_allclose(out.grad, np.sum(0.5 / curvature**2), rtol=1e-3)
    assert out.info.converged


def test_unused_info_is_not_computed():
    problem = ridge()
    f = implicit.hypergradient(problem.outer, problem.inner, solver=implicit.neumann(10, 0.3))

    def flops(g):
        compiled = jax.jit(g).lower(problem.params, problem.theta).compile()
        return compiled.as_text().count(" dot(")

    assert flops(lambda w, t: f(w, t).grad) < flops(f)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_batches_over_a_mesh(kind):
    """The same hypergradient, with one all-reduce for each product."""
    keys = jax.random.split(jax.random.key(0), 2)
    rows, labels = jax.random.normal(keys[0], (64, 5)), jax.random.normal(keys[1], (64,))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType[kind],))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    w, theta = jnp.linspace(0.0, 1.0, 5), jnp.zeros(5)

    def grad(rows, labels, w, theta, solver):
        def inner(w, theta):
            fit = jnp.mean(jnp.tanh(rows @ w - labels) ** 2)
            return fit + jnp.sum(jnp.exp(theta) * w**2) / 2

        def outer(w, theta):
            return jnp.mean((rows @ w - 1) ** 2)

        return implicit.hypergradient(outer, inner, solver=solver)(w, theta).grad

    one = grad(rows, labels, w, theta, lx.CG(**TIGHT))
    spread = jax.device_put((rows, labels), sharding)
    replicated = jax.device_put((w, theta), everywhere)
    jitted = jax.jit(grad, static_argnums=4)
    many = jitted(*spread, *replicated, lx.CG(**TIGHT))
    np.testing.assert_allclose(many, one, rtol=1e-9)

    def reductions(terms):
        arguments = *spread, *replicated
        solver = implicit.neumann(terms, 0.3)
        text = jax.jit(lambda *x: grad(*x, solver)).lower(*arguments).compile().as_text()
        loops = [part for part in text.split("\n\n") if part.lstrip("%").startswith("region")]
        inside = [part.count(" all-reduce(") for part in loops]
        return text.count(" all-reduce("), sum(inside)

    total, inside = reductions(20)
    assert inside == 1  # of the product, in the series' loop
    assert total <= 4  # and outer, the inner gradient, the mixed product


def test_descending_it():
    """Outer optimization with a warm-started solve, in one scan."""
    problem = ridge(decay=0.1)
    solver = lx.CG(rtol=1e-8, atol=1e-8, max_steps=20)
    f = implicit.hypergradient(problem.outer, problem.inner, solver=solver)
    optimizer = optax.adam(0.1)

    def step(carry, _):
        w, theta, state, v = carry
        gradient, hessian = jax.grad(problem.inner)(w, theta), jax.hessian(problem.inner)(w, theta)
        w = w - jnp.linalg.solve(hessian, gradient)
        out = f(w, theta, v)
        updates, state = optimizer.update(out.grad, state)
        return (w, optax.apply_updates(theta, updates), state, out.v), out.outer_loss

    begin = problem.params, problem.theta, optimizer.init(problem.theta), jnp.zeros(8)
    (_, theta, _, _), losses = jax.lax.scan(step, begin, length=300)
    assert losses[-1] < losses[0]
    w = jnp.linalg.solve(
        jax.hessian(problem.inner)(problem.params, theta),
        -jax.grad(problem.inner)(jnp.zeros(8), theta),
    )
    assert jnp.linalg.norm(f(w, theta).grad) < 1e-2 * jnp.linalg.norm(problem.exact)


def test_errors():
    problem = ridge()
    w, theta = problem.params, problem.theta
    solver = lx.CG(1e-6, 1e-6)
    with raises(TypeError, "`solver`", "lineax.CG"):
        implicit.hypergradient(problem.outer, problem.inner, solver="cg")
    with raises(TypeError, "`outer`"):
        implicit.hypergradient(1.0, problem.inner, solver=solver)
    with raises(ValueError, "`damping`", "-1"):
        implicit.hypergradient(problem.outer, problem.inner, solver=solver, damping=-1.0)
    f = implicit.hypergradient(problem.outer, lambda w, t: w**2, solver=solver)
    with raises(ValueError, "`inner`", "scalar"):
        f(w, theta)
    f = implicit.hypergradient(problem.outer, problem.inner, solver=solver)
    with raises(TypeError, "params['n']", "int"):
        f({"n": jnp.arange(3)}, theta)
    with raises(TypeError, "theta['n']", "int"):
        f(w, {"n": jnp.arange(3)})
    for make in (
        lambda: implicit.neumann(0),
        lambda: implicit.neumann(3, -0.1),
        lambda: implicit.neumann(3, "large"),
        lambda: implicit.nystrom(0, 0.1),
        lambda: implicit.nystrom(3, 0.0),
        lambda: implicit.identity(0.0),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
    big = implicit.hypergradient(problem.outer, problem.inner, solver=implicit.nystrom(9, 0.1))
    with raises(ValueError, "`rank`=9", "8 unknowns"):
        big(w, theta)


def test_imported_on_use():
    """lineax is imported by ``ug.implicit``, not by ``unrollgrad``."""
    assert ug.implicit is importlib.import_module("unrollgrad.implicit")
    with pytest.raises(AttributeError, match="implicitly"):
        ug.implicitly  # noqa: B018

"""Preconditioners of the linear solves: fewer steps, the same derivative."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from tests.helpers import mistyped, present, raises
from unrollgrad import implicit

SCALES = np.logspace(0, 5, 40)
FEW = lx.CG(1e-10, 1e-10, max_steps=12)


def _cubic(x, a):
    """Curvatures from 1 to 1e5, which depend on the point."""
    return SCALES * x + a[0] * x**3 - a[1]


def _inverse(x, a):
    return lx.DiagonalLinearOperator(1 / (SCALES + 3 * a[0] * x**2))


def _solve(init, a):
    def newton(i, x):
        return x - _inverse(x, a).mv(_cubic(x, a))

    return jax.lax.fori_loop(0, 30, newton, a[1] / SCALES)


WAYS = {
    "operator": lx.DiagonalLinearOperator(1 / (SCALES + 0.1)),
    "of the point": _inverse,
    "a product": lambda x, a: lambda v: v / (SCALES + 0.1),
}


def test_few_steps_are_enough_in_all_modes():
    """Twelve steps of CG: with a preconditioner exact, also twice; without one far off."""

    def derivatives(preconditioner):
        decorate = implicit.root(_cubic, solver=FEW, preconditioner=preconditioner)
        solution = decorate(_solve)

        def f(a):
            return solution(None, a)

        def twice(a):
            return jax.grad(lambda a: jnp.sum(f(a) ** 2))(a)

        return lambda a: (jax.jacfwd(f)(a), jax.jacrev(f)(a), jax.jacfwd(twice)(a))

    a = np.array([1.0, 2.0])

    @jax.jit
    def found(a):
        ways = {name: derivatives(way)(a) for name, way in (WAYS | {"none": None}).items()}
        return _solve(None, a), ways

    x, ways = found(a)
    slope = SCALES + 3 * a[0] * x**2
    jacobian = np.stack([-(x**3) / slope, 1 / slope], -1)
    # d2 x/da db, from slope dx = (db - x^3 da), twice.
    fa, fb = jacobian.T
    second = np.empty((2, 2))
    for (i, j), mixed in {(0, 0): -6 * x**2 * fa, (0, 1): -3 * x**2 * fb, (1, 1): 0 * x}.items():
        bend = (mixed - 6 * a[0] * x * jacobian[:, i] * jacobian[:, j]) / slope
        second[i, j] = second[j, i] = np.sum(2 * jacobian[:, i] * jacobian[:, j] + 2 * x * bend)
    for name in WAYS:
        for got in ways[name][:2]:
            np.testing.assert_allclose(got, jacobian, rtol=1e-6, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(ways[name][2], second, rtol=1e-6, err_msg=name)
    assert np.abs(ways["none"][0] - jacobian).max() > 1e-2


def test_reverse_mode_takes_the_transpose():
    """With the inverse of an unsymmetric matrix, one turn of GMRES is exact both ways."""
    matrix = np.random.default_rng(0).normal(size=(30, 30)) * np.logspace(0, 3, 30)
    inverse = lx.MatrixLinearOperator(jnp.asarray(np.linalg.inv(matrix)))
    solver = lx.GMRES(1e-10, 1e-10, max_steps=2, restart=2)

    @jax.jit
    def jacobians(b):
        found = {}
        for name, given in {"with": inverse, "without": None}.items():
            decorate = implicit.root(
                lambda x, b: matrix @ x - b, solver=solver, preconditioner=given
            )
            f = decorate(lambda init, b: jnp.linalg.solve(matrix, b))
            found[name] = jax.jacfwd(f, 1)(None, b), jax.jacrev(f, 1)(None, b)
        return found

    found, truth = jacobians(np.ones(30)), np.linalg.inv(matrix)
    for got in found["with"]:
        np.testing.assert_allclose(got, truth, rtol=1e-6, atol=1e-8 * np.abs(truth).max())
    for got in found["without"]:
        assert np.linalg.norm(got - truth) > 0.1 * np.linalg.norm(truth)


def test_the_default_solver_and_normal_equations():
    @jax.jit
    def jacobians(a):
        ways = {
            "default": implicit.root(_cubic, preconditioner=_inverse),
            "normal": implicit.root(_cubic, solver=lx.Normal(FEW), preconditioner=_inverse),
            "fixed point": implicit.fixed_point(
                lambda x, a: x - _cubic(x, a), solver=FEW, preconditioner=_inverse
            ),
            "argmin": implicit.argmin(
                lambda x, a: jnp.sum(SCALES * x**2 / 2 + a[0] * x**4 / 4 - a[1] * x),
                preconditioner=_inverse,
            ),
        }
        x = _solve(None, a)
        return x, {name: jax.jacrev(way(_solve), 1)(None, a) for name, way in ways.items()}

    x, found = jacobians(np.array([1.0, 2.0]))
    slope = SCALES + 3 * x**2
    for name, got in found.items():
        truth = np.stack([-(x**3) / slope, 1 / slope], -1)
        np.testing.assert_allclose(got, truth, rtol=1e-6, atol=1e-9, err_msg=name)


def test_a_hypergradient_takes_fewer_products():
    """The decay is known, so that the inverse of H is, but for a matrix of low rank."""
    row = jnp.asarray(np.random.default_rng(1).normal(size=40))

    def inner(w, theta):
        return jnp.sum(jnp.exp(theta) * w**2) / 2 + (row @ w - 1) ** 2 / 2

    def outer(w, theta):
        return jnp.sum(w)

    def scaled(w, theta):
        return lx.DiagonalLinearOperator(jnp.exp(-theta))

    @jax.jit
    def results(w, theta):
        solver = lx.CG(1e-10, 1e-10, max_steps=1000)
        return [
            implicit.hypergradient(outer, inner, solver=solver, preconditioner=given)(w, theta)
            for given in (None, scaled, lambda w, theta: lx.DiagonalLinearOperator(-(w**2) - 1))
        ]

    theta = np.log(SCALES)
    hessian = np.diag(SCALES) + np.outer(row, row)
    w = np.linalg.solve(hessian, row)
    plain, fewer, wrong = results(w, theta)
    truth = -np.linalg.solve(hessian, np.ones(40)) * SCALES * w
    for result in (plain, fewer):
        np.testing.assert_allclose(result.grad, truth, rtol=1e-6, atol=1e-9)
        assert result.info.converged
    assert fewer.info.iterations <= 5
    assert plain.info.iterations > 30
    assert not wrong.info.converged  # CG stops in silence, and says that it succeeded


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_what_is_not_definite_is_no_silent_derivative(mode):
    negative = lx.DiagonalLinearOperator(-np.ones(3))
    decorate = implicit.argmin(lambda x, a: jnp.sum(x**2) / 2 - a * x[0], preconditioner=negative)
    found = jax.jit(mode(decorate(lambda init, a: jnp.array([a, 0, 0])), 1))(None, 1.0)
    assert np.isnan(found).all()


def test_errors():
    def f(x, a):
        return x - a

    def derivative(given, solver=None):
        solve = implicit.root(f, solver=solver, preconditioner=given)(lambda init, a: a)
        return jax.eval_shape(jax.jacfwd(solve, 1), None, jnp.ones(2))

    with raises(TypeError, "`preconditioner`", "3.0", "DiagonalLinearOperator"):
        implicit.root(f, preconditioner=mistyped(3.0))
    with raises(ValueError, "`preconditioner`", "lineax.CG", "LSMR"):
        implicit.root(f, solver=lx.LSMR(1e-6, 1e-6), preconditioner=lambda x, a: lambda v: v)
    with raises(ValueError, "`preconditioner`", "SVD"):
        implicit.hypergradient(f, f, solver=implicit.dense(), preconditioner=lambda x, a: None)
    with raises(TypeError, "`preconditioner`", "takes", "expected (2,), got (3,)"):
        derivative(lx.DiagonalLinearOperator(np.ones(3)))
    with raises(TypeError, "`preconditioner`", "returns", "expected (2,), got ()"):
        derivative(lambda x, a: jnp.sum)
    with raises(TypeError, "`preconditioner`", "lambda *point"):
        derivative(lambda x, a: x)


def test_the_units_of_the_matrix_do_not_matter_to_gmres():
    """It compares the preconditioned residual with the machine epsilon, whatever its units."""
    matrix = np.diag(np.linspace(1, 1000, 20)) + 0.02 * np.eye(20, k=1) + 0.02 * np.eye(20, k=-1)
    theta = np.linspace(-1, 1, 20).astype(np.float32)

    @jax.jit
    def gradient(scale):
        inverse = lx.DiagonalLinearOperator(1 / (scale * jnp.linspace(1, 1000, 20)))

        def inner(x, b):
            return scale * (0.5 * x @ jnp.asarray(matrix, jnp.float32) @ x - b @ x)

        solver = lx.GMRES(rtol=1e-5, atol=1e-5)
        f = implicit.hypergradient(
            lambda x, b: jnp.sum(x), inner, solver=solver, preconditioner=inverse
        )
        out = f(jnp.linalg.solve(jnp.asarray(matrix, jnp.float32), theta), theta)
        return out.grad, present(out.info).converged

    exact = np.linalg.solve(matrix, np.ones(20))
    for scale in (1e-8, 1.0, 1e10):
        grad, converged = gradient(jnp.float32(scale))
        np.testing.assert_allclose(grad, exact, rtol=1e-4)
        assert converged

"""What is wrong with an inner problem or a solve shows in ``info``, and raises with ``check``."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from tests.helpers import raises
from tests.quadratics import quadratic, ridge
from unrollgrad import implicit

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def _both(outer, inner, w, theta, **settings):
    """The info, and a function that raises."""
    info = implicit.hypergradient(outer, inner, **settings)(w, theta).info
    return info, lambda: implicit.hypergradient(outer, inner, check=True, **settings)(w, theta)


def test_nothing_is_wrong():
    problem = ridge()
    info, checked = _both(
        problem.outer, problem.inner, problem.params, problem.theta, solver=lx.CG(**TIGHT)
    )
    checked()
    assert info.stationarity < 1e-12
    assert info.residual < 1e-9
    assert info.asymmetry < 1e-12
    assert info.negative_curvature == 0
    assert info.converged
    assert 0 < int(info.iterations) <= 9


def test_an_operator_that_is_not_symmetric():
    problem = quadratic([3.0, 2.0, 1.0, 1.0])
    skew = jnp.zeros((4, 4)).at[0, 1].set(1.0).at[1, 0].set(-1.0)
    matrix = problem.hessian + skew
    w, theta = jnp.linalg.solve(problem.hessian, problem.mixed @ jnp.ones(3)), jnp.ones(3)
    for curvature in (
        lambda w, theta: lx.MatrixLinearOperator(matrix),
        lambda w, theta: lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag),
    ):
        info, checked = _both(
            problem.outer, problem.inner, w, theta, solver=lx.CG(**TIGHT), curvature=curvature
        )
        size = jnp.linalg.norm(matrix - matrix.T) / jnp.linalg.norm(matrix) / np.sqrt(2)
        np.testing.assert_allclose(info.asymmetry, size, rtol=0.5)
        with raises(implicit.HypergradientError, "not symmetric", "GMRES", "BiCGStab"):
            checked()
        _, fine = _both(
            problem.outer, problem.inner, w, theta, solver=lx.GMRES(**TIGHT), curvature=curvature
        )
        fine()


def test_a_saddle():
    problem = quadratic([3.0, 2.0, 1.0, -0.5])
    theta = jnp.ones(3)
    w = jnp.linalg.solve(problem.hessian, problem.mixed @ theta)
    info, checked = _both(problem.outer, problem.inner, w, theta, solver=lx.CG(**TIGHT))
    np.testing.assert_allclose(info.negative_curvature, 0.5, rtol=1e-6)
    with raises(implicit.HypergradientError, "indefinite", "more inner steps", "damping=1"):
        checked()
    implicit.hypergradient(
        problem.outer, problem.inner, solver=lx.CG(**TIGHT), damping=1.0, check=True
    )(w, theta)


def test_one_negative_curvature_among_many():
    """Seen among 2000 directions, in float32."""
    with jax.enable_x64(False):
        diagonal = jnp.linspace(0.1, 1.0, 2000).at[7].set(-1.0)
        info = implicit.hypergradient(
            lambda w, theta: jnp.sum(w),
            lambda w, theta: jnp.sum(diagonal * w**2) / 2 + theta * jnp.sum(w),
            solver=implicit.identity(),
        )(jnp.ones(2000), jnp.float32(1.0)).info
        assert 0.9 < float(info.negative_curvature) <= 1.0001
        assert float(info.asymmetry) < 1e-5


def test_a_series_that_diverges():
    problem = quadratic([4.0, 2.0, 1.0])
    theta = jnp.ones(3)
    w = jnp.linalg.solve(problem.hessian, problem.mixed @ theta)
    settings = {"solver": implicit.neumann(30, 0.55)}  # the limit is 0.5
    info, checked = _both(problem.outer, problem.inner, w, theta, **settings)
    assert not info.converged
    assert info.residual > 1
    with raises(implicit.HypergradientError, "diverges", "2 / lambda_max = 0.5", '"auto"'):
        checked()
    for fine in (implicit.neumann(30, 0.45), implicit.neumann(3, 1e-3), implicit.neumann(30)):
        info, checked = _both(problem.outer, problem.inner, w, theta, solver=fine)
        checked()
        assert info.converged


@pytest.mark.parametrize(("step_size", "terms"), [(2.1, 5), (2.5, 3), (3.0, 2)])
def test_a_series_that_has_only_begun_to_diverge(step_size, terms):
    curvature = jnp.linspace(0.01, 1.0, 100)
    _, checked = _both(
        lambda w, theta: jnp.sum(w),
        lambda w, theta: jnp.sum(curvature * w**2 / 2 - theta * w),
        1 / curvature,
        jnp.ones(100),
        solver=implicit.neumann(terms, step_size),
    )
    with raises(implicit.HypergradientError, "diverges", "2 / lambda_max = 2"):
        checked()


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": implicit.identity(1e-3)},
        {"solver": implicit.nystrom(2, 100.0)},
        {"solver": lx.CG(**TIGHT), "damping": 100.0},
        {"solver": implicit.neumann(5, 0.3)},
    ],
)
def test_whether_it_is_solved_does_not_depend_on_the_solver(settings):
    problem = ridge()
    for share, healthy in ((0.5, False), (1.0, True), (1.001, True)):
        w = share * problem.params
        _, checked = _both(problem.outer, problem.inner, w, problem.theta, **settings)
        if healthy:
            checked()
        else:
            with raises(implicit.HypergradientError, "not solved"):
                checked()


def test_an_inner_problem_that_is_not_solved():
    problem = ridge()
    w = jnp.zeros(8)
    for _ in range(3):
        info, checked = _both(problem.outer, problem.inner, w, problem.theta, solver=lx.CG(**TIGHT))
        gradient = jax.grad(problem.inner)(w, problem.theta)
        np.testing.assert_allclose(info.stationarity, jnp.linalg.norm(gradient), rtol=1e-10)
        with raises(implicit.HypergradientError, "not solved", "more inner steps"):
            checked()
        w = w - 0.3 * gradient


def test_a_singular_hessian_that_cannot_be_solved():
    problem = quadratic([1.0, 0.5, 0.0, 0.0])
    theta = jnp.ones(3)
    w = jnp.linalg.pinv(problem.hessian, hermitian=True) @ problem.mixed @ theta
    info, checked = _both(problem.outer, problem.inner, w, theta, solver=lx.CG(**TIGHT))
    assert not info.converged
    with raises(implicit.HypergradientError, "singular", "damping=0.001", "LSMR"):
        checked()
    for solver, damping in ((implicit.dense(), 0.0), (lx.CG(**TIGHT), 1e-3)):
        implicit.hypergradient(
            problem.outer, problem.inner, solver=solver, damping=damping, check=True
        )(w, theta)


def test_a_few_terms_are_a_result():
    """Stopped by intent: no error, and the residual says how far it came."""
    problem = ridge()
    for solver in (
        lx.CG(**TIGHT, max_steps=3),
        lx.CG(rtol=0.0, atol=0.0, max_steps=3),
        implicit.neumann(3, 0.3),
        implicit.identity(0.3),
        implicit.nystrom(3, 2.0),
    ):
        info, checked = _both(
            problem.outer, problem.inner, problem.params, problem.theta, solver=solver
        )
        checked()
        assert 1e-6 < float(info.residual) < 1


def test_an_inner_problem_that_diverged():
    problem = ridge()
    w = problem.params.at[0].set(jnp.nan)
    info, checked = _both(problem.outer, problem.inner, w, problem.theta, solver=lx.CG(**TIGHT))
    assert not info.converged
    with raises(implicit.HypergradientError, "not finite", "diverged"):
        checked()


def test_nothing_is_raised_under_jit():
    problem = ridge()
    f = implicit.hypergradient(problem.outer, problem.inner, solver=lx.CG(**TIGHT), check=True)
    info = jax.jit(f)(jnp.zeros(8), problem.theta).info
    assert info.stationarity > 0.1

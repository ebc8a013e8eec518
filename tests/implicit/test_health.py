"""Faults of an inner problem or of a solve show in ``info``, and raise with ``check``."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from tests.helpers import numbers, present, raises
from tests.quadratics import quadratic, ridge
from unrollgrad import implicit

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def _both(outer, inner, w, theta, **settings):
    """The info, from one program, and a function that raises, which compiles many programs."""
    f = implicit.hypergradient(outer, inner, **settings)
    info = numbers(jax.jit(lambda w, theta: f(w, theta).info)(w, theta))
    return info, lambda: _check(outer, inner, w, theta, **settings)


def _check(outer, inner, w, theta, **settings):
    """The info; raises if anything is wrong."""
    return present(implicit.hypergradient(outer, inner, check=True, **settings)(w, theta).info)


def test_nothing_is_wrong():
    problem = ridge()
    place = problem.params, problem.theta
    info = _check(problem.outer, problem.inner, *place, solver=lx.CG(**TIGHT))
    assert info.stationarity < 1e-12
    assert info.residual < 1e-9
    assert info.asymmetry < 1e-12
    assert info.negative_curvature == 0
    assert info.converged
    assert 0 < int(info.iterations) <= 9


def test_an_operator_that_is_not_symmetric():
    problem = quadratic([3.0, 2.0, 1.0, 1.0])
    skew = np.zeros((4, 4))
    skew[0, 1], skew[1, 0] = 1.0, -1.0
    matrix, theta = problem.hessian + skew, np.ones(3)
    w = problem.minimum(theta)
    size = np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix) / np.sqrt(2)
    for curvature in (
        lambda w, theta: lx.MatrixLinearOperator(jnp.asarray(matrix)),
        lambda w, theta: lx.MatrixLinearOperator(jnp.asarray(matrix), lx.positive_semidefinite_tag),
    ):
        info, checked = _both(
            problem.outer, problem.inner, w, theta, solver=lx.CG(**TIGHT), curvature=curvature
        )
        np.testing.assert_allclose(info.asymmetry, size, rtol=0.5)
        with raises(implicit.HypergradientError, "not symmetric", "GMRES", "BiCGStab"):
            checked()
    fine = {"solver": lx.GMRES(**TIGHT), "curvature": curvature}
    _check(problem.outer, problem.inner, w, theta, **fine)


def test_a_saddle():
    problem = quadratic([3.0, 2.0, 1.0, -0.5])
    theta = np.ones(3)
    w = problem.minimum(theta)
    info, checked = _both(problem.outer, problem.inner, w, theta, solver=lx.CG(**TIGHT))
    np.testing.assert_allclose(info.negative_curvature, 0.5, rtol=1e-6)
    with raises(implicit.HypergradientError, "indefinite", "more inner steps", "damping=1"):
        checked()
    _check(problem.outer, problem.inner, w, theta, solver=lx.CG(**TIGHT), damping=1.0)


def test_one_negative_curvature_among_many():
    """The check finds it among 2000 directions, in float32."""
    with jax.enable_x64(False):
        diagonal = np.linspace(0.1, 1.0, 2000, dtype=np.float32)
        diagonal[7] = -1.0
        info, _ = _both(
            lambda w, theta: jnp.sum(w),
            lambda w, theta: jnp.sum(diagonal * w**2) / 2 + theta * jnp.sum(w),
            np.ones(2000, np.float32),
            np.float32(1.0),
            solver=implicit.identity(),
        )
        assert 0.9 < float(info.negative_curvature) <= 1.0001
        assert float(info.asymmetry) < 1e-5


def test_a_series_that_diverges():
    problem = quadratic([4.0, 2.0, 1.0, 1.0])
    theta = np.ones(3)
    w = problem.minimum(theta)
    settings = {"solver": implicit.neumann(30, 0.55)}  # the limit is 0.5
    info, checked = _both(problem.outer, problem.inner, w, theta, **settings)
    assert not info.converged
    assert info.residual > 1
    with raises(implicit.HypergradientError, "diverges", "2 / lambda_max = 0.5", '"auto"'):
        checked()
    for fine in (implicit.neumann(30, 0.45), implicit.neumann(3, 1e-3), implicit.neumann(30)):
        assert _check(problem.outer, problem.inner, w, theta, solver=fine).converged


@pytest.mark.parametrize(("step_size", "terms"), [(2.1, 5), (2.5, 3), (3.0, 2)])
def test_a_series_that_has_only_begun_to_diverge(step_size, terms):
    curvature = np.linspace(0.01, 1.0, 100)
    with raises(implicit.HypergradientError, "diverges", "2 / lambda_max = 2"):
        _check(
            lambda w, theta: jnp.sum(w),
            lambda w, theta: jnp.sum(curvature * w**2 / 2 - theta * w),
            1 / curvature,
            np.ones(100),
            solver=implicit.neumann(terms, step_size),
        )


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
    for share, healthy in ((0.5, False), (1.001, True)):
        place = problem.outer, problem.inner, share * problem.params, problem.theta
        if healthy:
            _check(*place, **settings)
        else:
            with raises(implicit.HypergradientError, "not solved"):
                _check(*place, **settings)


def test_an_inner_problem_that_is_not_solved():
    problem, w = ridge(), np.zeros(8)
    f = implicit.hypergradient(problem.outer, problem.inner, solver=lx.CG(**TIGHT))
    seen = jax.jit(lambda w, theta: present(f(w, theta).info).stationarity)
    for _ in range(3):
        gradient = problem.hessian @ (w - problem.params)
        stationarity = seen(w, problem.theta)
        np.testing.assert_allclose(stationarity, np.linalg.norm(gradient), rtol=1e-10)
        with raises(implicit.HypergradientError, "not solved", "more inner steps"):
            _check(problem.outer, problem.inner, w, problem.theta, solver=lx.CG(**TIGHT))
        w = w - 0.3 * gradient


def test_a_singular_hessian_that_cannot_be_solved():
    problem = quadratic([1.0, 0.5, 0.0, 0.0])
    theta = np.ones(3)
    w = problem.minimum(theta)
    info, checked = _both(problem.outer, problem.inner, w, theta, solver=lx.CG(**TIGHT))
    assert not info.converged
    with raises(implicit.HypergradientError, "singular", "damping=0.001", "LSMR"):
        checked()
    for solver, damping in ((implicit.dense(), 0.0), (lx.CG(**TIGHT), 1e-3)):
        _check(problem.outer, problem.inner, w, theta, solver=solver, damping=damping)


def test_a_few_terms_are_a_result():
    """A solve that stops on purpose raises no error, and reports its residual."""
    problem = ridge()
    solvers = (
        lx.CG(**TIGHT, max_steps=3),
        lx.CG(rtol=0.0, atol=0.0, max_steps=3),
        implicit.neumann(3, 0.3),
        implicit.identity(0.3),
        implicit.nystrom(3, 2.0),
    )
    for solver in solvers:
        info = _check(problem.outer, problem.inner, problem.params, problem.theta, solver=solver)
        assert 1e-6 < float(info.residual) < 1


def test_an_inner_problem_that_diverged():
    problem = ridge()
    w = np.array([np.nan, *problem.params[1:]])
    info, checked = _both(problem.outer, problem.inner, w, problem.theta, solver=lx.CG(**TIGHT))
    assert not info.converged
    with raises(implicit.HypergradientError, "not finite", "diverged"):
        checked()


def test_nothing_is_raised_under_jit():
    problem = ridge()
    f = implicit.hypergradient(problem.outer, problem.inner, solver=lx.CG(**TIGHT), check=True)
    info = jax.jit(f)(np.zeros(8), problem.theta).info
    assert info.stationarity > 0.1

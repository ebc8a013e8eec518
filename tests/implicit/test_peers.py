"""The cases of jaxopt's, optimistix's and lineax's own tests, on ours.

The peers' installed packages contain no tests, so that the cases were written anew from their
interfaces, as rows of tables. A case is a row in one mode. A third of the rows runs by default, and
all of them with ``PEERS=all`` in the environment. What came out in November 2026, of all:

| peer | cases | right | others |
|---|---|---|---|
| jaxopt, equations and linear solvers, in 2 modes | 76 | 76 | |
| jaxopt, ways to call | 17 | 17 | |
| optimistix, in 2 modes | 24 | 24 | |
| optimistix under strict promotion | 24 | 24 | |
| lineax, in 4 modes and 2 dtypes | 288 | 282 | 4 NaN, 2 skipped, as said in the test |

What cannot be written with the decorators: lineax's matrices that are not square or are complex
(both are refused), and jaxopt's ``ridge=`` and ``reference_signature=``.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from tests.helpers import numbers
from unrollgrad import implicit


def some(names):
    """A third of the names, or all of them if the environment says ``PEERS=all``."""
    names = list(names)
    return names if os.environ.get("PEERS") == "all" else names[::3]


MODES = {"jacfwd": jax.jacfwd, "jacrev": jax.jacrev}
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
draws = np.random.default_rng(0)
X, Y = draws.normal(size=(20, 4)), draws.normal(size=20)
SOFT = np.array([0.3, -0.8, 1.1, 0.1])


class Row(NamedTuple):
    """A solver, the equation that it solves, and where it is differentiated."""

    decorate: Callable[..., Any]
    solve: Callable[..., Any]
    at: Any  # the one argument, a tree


def results(rows, modes=MODES):
    """Jacobians of every row, in one program, and differences of the solvers themselves.

    What a row raises is its result.
    """

    def jacobian(row, mode):
        solve = row.decorate(row.solve)
        return mode(lambda a: ravel_pytree(solve(None, a))[0])(row.at)

    def differences(row, epsilon=1e-5):
        flat, unravel = ravel_pytree(row.at)

        def f(a):
            return ravel_pytree(row.solve(None, unravel(a)))[0]

        steps = epsilon * jnp.eye(flat.size, dtype=flat.dtype)
        return jax.vmap(lambda e: (f(flat + e) - f(flat - e)) / (2 * epsilon))(steps).T

    def flattened(jacobian):
        columns = [x.reshape(len(x), -1) for x in jax.tree.leaves(jacobian)]
        return jnp.concatenate(columns, 1)

    def attempt(function):
        try:
            return function()
        except Exception as error:
            errors.append(error)
            return jnp.float32(len(errors) - 1)

    errors: list = []

    @jax.jit
    def everything():
        return {
            name: [differences(row)]
            + [attempt(lambda: flattened(jacobian(row, mode))) for mode in modes.values()]  # noqa: B023
            for name, row in rows.items()
        }

    found = numbers(everything())
    for name, values in found.items():
        found[name] = [errors[int(x)] if np.ndim(x) == 0 else x for x in values]
    return {name: dict(zip(["truth", *modes], x, strict=True)) for name, x in found.items()}


def compare(found, mode, rtol=1e-5, atol=1e-7):
    if isinstance(found[mode], Exception):
        raise found[mode]
    np.testing.assert_allclose(found[mode], found["truth"], rtol=rtol, atol=atol)
    assert np.abs(found["truth"]).max() > 1e-3


def turns(step, start, number=500):
    """A solver that repeats ``step(x, a)``."""
    return lambda init, a: jax.lax.fori_loop(
        0, number, lambda i, x: step(x, a), jax.tree.map(jnp.asarray, start)
    )


def newton(residual, start, number=25):
    """A solver of ``residual(x, a) = 0`` from ``start``, for trees."""
    flat, unravel = ravel_pytree(start)

    def step(x, a):
        def f(x):
            return ravel_pytree(residual(unravel(x), a))[0]

        return x - jnp.linalg.solve(jax.jacfwd(f)(x), f(x))

    return lambda init, a: unravel(jax.lax.fori_loop(0, number, lambda i, x: step(x, a), flat))


# jaxopt: proximal operators, projections, mirror maps; optimality conditions; losses.


def soft(x, by):
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - by, 0)


def simplex(x):
    """The nearest point of the simplex, by sorting."""
    down = -jnp.sort(-x)
    sums = (jnp.cumsum(down) - 1) / jnp.arange(1, x.size + 1)
    return jnp.maximum(x - sums[jnp.sum(down > sums) - 1], 0)


def l1_ball(x, radius):
    inside = jnp.abs(x)
    return jnp.sign(x) * radius * simplex(inside / radius)


def least_squares(w, a):
    return jnp.sum((X @ w - Y * a["scale"]) ** 2) / 40


def stepped(after, rate=0.5):
    """A fixed point: a gradient step of least squares, and then ``after(w, number)``."""

    def step(w, a):
        return after(w - rate * jax.grad(least_squares)(w, a), a["number"])

    at = {"scale": jnp.float64(1.3), "number": jnp.float64(0.05)}
    return Row(implicit.fixed_point(step), turns(step, np.full(4, 0.1)), at)


def group(x, by):
    norm = jnp.linalg.norm(x)
    return x * jnp.maximum(1 - 0.5 * by / norm, 0)


FIXED_POINTS = {
    "gradient step": lambda w, c: w - 0.5 * c * w,
    "prox_lasso": lambda w, c: soft(w, 0.5 * c),
    "prox_non_negative_lasso": lambda w, c: jnp.maximum(w - 0.5 * c, 0),
    "prox_elastic_net": lambda w, c: soft(w, 0.5 * c) / (1 + 0.25 * c),
    "prox_group_lasso": group,
    "prox_ridge": lambda w, c: w / (1 + c),
    "prox_non_negative_ridge": lambda w, c: jnp.maximum(w / (1 + c), 0),
    "projection_non_negative": lambda w, c: jnp.maximum(w + c, 0),
    "projection_box": lambda w, c: jnp.clip(w, -c, 3 * c),
    "projection_hypercube": lambda w, c: jnp.clip(w, 0, c),
    "projection_simplex": lambda w, c: c * simplex(w / c),
    "projection_l1_ball": lambda w, c: l1_ball(w, 3 * c),
    "projection_l2_ball": lambda w, c: w * jnp.minimum(1, 2 * c / jnp.linalg.norm(w)),
    "projection_l2_sphere": lambda w, c: c * w / jnp.linalg.norm(w),
    "projection_hyperplane": lambda w, c: w - (jnp.sum(w) - c) / 4,
    "projection_halfspace": lambda w, c: w - jnp.maximum(jnp.sum(w) + c, 0) / 4,
    "projection_affine_set": lambda w, c: w - PROJECT @ (ROWS @ w - c),
}
ROWS = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, -1.0, 2.0]])
PROJECT = np.linalg.pinv(ROWS)


def mirror(w, a):
    """A step of entropic mirror descent on the simplex."""
    return jax.nn.softmax(jnp.log(w) - 0.5 * (w - a))


def dual(a):
    return jnp.array([[2.0, 0.3], [0.3, 1.0]]) + a[0] * jnp.eye(2)


def kkt_equality(x, a):
    """A quadratic program on x1 + x2 = a1: stationarity, and the constraint."""
    return dual(a) @ x["primal"] - a[:2] + x["dual"], jnp.sum(x["primal"]) - a[1]


def as_tree(pair):
    return {"primal": pair[0], "dual": pair[1]}


def kkt_inequality(x, a):
    """The same with -x <= 0.1 and complementary slackness; one constraint is active."""
    primal, slack = x["primal"], (-x["primal"] - 0.1) * x["dual"]
    return {"primal": dual(a) @ primal - jnp.array([1.0, -2.0]) * a[2] - x["dual"], "dual": slack}


LOSSES = {
    "squared": lambda t: t**2 / 2,
    "logistic": lambda t: jax.nn.softplus(-t),
    "huber": lambda t: jnp.where(jnp.abs(t) < 0.7, t**2 / 2, 0.7 * (jnp.abs(t) - 0.35)),
    "squared hinge": lambda t: jnp.maximum(1 - t, 0) ** 2 / 2,
    "log cosh": lambda t: jnp.logaddexp(t, -t),
    "poisson": lambda t: jnp.exp(0.3 * t) - 0.3 * t,
    "pseudo Huber": lambda t: jnp.sqrt(1 + t**2),
}


def penalised(loss):
    """The stationarity of a linear model, in the penalty and a shift of the targets."""

    def objective(w, a):
        return jnp.mean(loss(X @ w - Y - a[1])) + a[0] * jnp.sum(w**2) / 2

    return objective


def multiclass(w, a):
    labels = np.arange(20) % 3
    logits = X @ w["weights"] + w["bias"]
    picked = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    penalty = a * sum(jnp.sum(x**2) for x in jax.tree.leaves(w)) / 2
    return jnp.mean(jax.nn.logsumexp(logits, 1) - picked) + penalty


def minimised(objective, start, at, **settings):
    gradient = jax.grad(objective)
    return Row(implicit.argmin(objective, **settings), newton(gradient, start), at)


def rooted(residual, start, at, **settings):
    return Row(implicit.root(residual, **settings), newton(residual, start), at)


RIDGE = penalised(LOSSES["squared"])
PAIR = np.array([0.4, 0.2])
LINEAR_SOLVES: dict[str, Any] = {
    "solve_lu": {"solver": lx.LU()},
    "solve_cholesky": {"solver": lx.Cholesky()},
    "solve_inv": {"solver": implicit.dense()},
    "solve_qr": {"solver": lx.QR()},
    "solve_cg": {"solver": lx.CG(**TIGHT)},
    "solve_normal_cg": {"solver": lx.Normal(lx.CG(**TIGHT))},
    "solve_gmres": {"solver": lx.GMRES(**TIGHT)},
    "solve_bicgstab": {"solver": lx.BiCGStab(**TIGHT)},
    "solve_cg, M": {
        "solver": lx.CG(**TIGHT),
        "preconditioner": lambda w, a: lambda v: v / (1 + a[0]),
    },
}


def scalar(x, a):
    return x**3 - x - a


@functools.cache
def jaxopt():
    rows = {f"fixed point, {name}": stepped(after) for name, after in FIXED_POINTS.items()}
    rows["fixed point, mirror descent"] = Row(
        implicit.fixed_point(mirror), turns(mirror, np.full(4, 0.25)), jnp.asarray(SOFT)
    )
    for name, loss in LOSSES.items():
        rows[f"stationarity, {name}"] = minimised(penalised(loss), np.zeros(4), PAIR)
    rows["stationarity, multiclass"] = minimised(
        multiclass, {"weights": np.zeros((4, 3)), "bias": np.zeros(3)}, jnp.float64(0.3)
    )
    three = jnp.array([0.5, 0.7, 1.0])
    start = {"primal": np.ones(2), "dual": np.zeros(())}
    rows["KKT, equality"] = rooted(lambda x, a: as_tree(kkt_equality(x, a)), start, three)
    start = {"primal": np.array([0.5, -0.1]), "dual": np.array([0.0, 2.0])}
    rows["KKT, inequality"] = rooted(kkt_inequality, start, three)
    for name, way in LINEAR_SOLVES.items():
        rows[f"ridge, {name}"] = rooted(jax.grad(RIDGE), np.zeros(4), PAIR, **way)
    rows["root of a scalar, bisection"] = rooted(scalar, np.float64(1.5), jnp.float64(0.8))
    return results({name: rows[name] for name in JAXOPT})


JAXOPT = some(
    [f"fixed point, {x}" for x in [*FIXED_POINTS, "mirror descent"]]
    + [f"stationarity, {x}" for x in [*LOSSES, "multiclass"]]
    + ["KKT, equality", "KKT, inequality", "root of a scalar, bisection"]
    + [f"ridge, {x}" for x in LINEAR_SOLVES]
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", JAXOPT)
def test_jaxopt(name, mode):
    compare(jaxopt()[name], mode)


def ridge(l2, x=X, y=Y):
    return np.linalg.solve(x.T @ x + l2 * np.eye(4), x.T @ y)


def ridge_slope(l2):
    return -np.linalg.solve(X.T @ X + l2 * np.eye(4), ridge(l2))


def ridge_gradient(w, l2, x, y):
    return x.T @ (x @ w - y) + l2 * w


def ridge_solve(init, l2, x, y):
    return jnp.linalg.solve(x.T @ x + l2 * jnp.eye(4), x.T @ y)


@functools.cache
def ridge_results():
    """jaxopt's ways to call: each result, and what it must be, by hand."""
    solve = implicit.root(ridge_gradient, solver=lx.Cholesky())(ridge_solve)
    keyword = implicit.root(lambda w, *, l2, x, y: ridge_gradient(w, l2, x, y))(
        lambda init, *, l2, x, y: ridge_solve(init, l2, x, y)
    )
    order = implicit.root(lambda w, y, x, l2: ridge_gradient(w, l2, x, y))(
        lambda init, l2, x=X, y=Y: ridge_solve(init, l2, x, y)
    )
    aux = implicit.root(ridge_gradient, has_aux=True)(
        lambda init, *args: (ridge_solve(init, *args), {"steps": 3, "name": "exact"})
    )
    tree = implicit.root(lambda w, a: {"w": ridge_gradient(w["w"], a["l2"], X, Y), "none": None})(
        lambda init, a: {"w": ridge_solve(init, a["l2"], X, Y), "none": None}
    )
    known = implicit.root(ridge_gradient)(lambda init, l2, x, y: ridge(2.0))

    def closed(l2):
        return implicit.root(lambda w: ridge_gradient(w, l2, X, Y))(
            lambda init: ridge_solve(init, l2, X, Y)
        )(None)

    @jax.jit
    def everything(l2):
        batch = jnp.stack([l2, l2 + 1])
        cotangent = jnp.arange(4.0)
        return {
            "value": solve(None, l2, X, Y),
            "argnums": jax.jacrev(solve, (1, 3))(None, l2, X, Y),
            "design": jnp.sum(jax.jacrev(solve, 2)(None, l2, X, Y) * X),
            "initial": jax.jacrev(solve, 0)(jnp.ones(4), l2, X, Y),
            "vmap of grad": jax.vmap(lambda l2: jax.jacrev(solve, 1)(None, l2, X, Y))(batch),
            "grad of vmap": jax.jacrev(
                lambda b: jax.vmap(lambda l2: solve(None, l2, X, Y))(b).sum(0)
            )(batch),
            "vmap of jvp": jax.vmap(lambda l2: jax.jacfwd(solve, 1)(None, l2, X, Y))(batch),
            "keywords": jax.jacrev(lambda l2: keyword(None, l2=l2, x=X, y=Y))(l2),
            "names in another order": jax.jacrev(lambda l2: order(None, l2=l2, x=X, y=Y))(l2),
            "has_aux": jax.jacrev(lambda l2: aux(None, l2, X, Y)[0])(l2),
            "tree with None": jax.jacrev(lambda l2: tree(None, {"l2": l2, "n": None})["w"])(l2),
            "closed over": jax.jacrev(closed)(l2),
            "root_vjp": jax.vjp(lambda l2: known(None, l2, X, Y), l2)[1](cotangent)[0],
            "root_jvp": jax.jvp(lambda l2: known(None, l2, X, Y), (l2,), (3.0,))[1],
            "jit inside": jax.jacrev(jax.jit(lambda l2: solve(None, l2, X, Y)))(l2),
            "in a loop": jax.jacfwd(
                lambda l2: jax.lax.fori_loop(0, 2, lambda i, w: solve(w, l2, X, Y), jnp.zeros(4))
            )(l2),
            "hessian": jax.jacfwd(jax.jacrev(solve, 1), 1)(None, l2, X, Y),
        }

    inverse, slope = np.linalg.inv(X.T @ X + 2 * np.eye(4)), ridge_slope(2.0)
    both = np.stack([slope, ridge_slope(3.0)])
    once = dict.fromkeys(["keywords", "names in another order", "has_aux", "tree with None"], slope)
    once |= dict.fromkeys(["closed over", "jit inside", "in a loop"], slope)
    # Along X itself: X' X + l2 and X' y change by 2 X' X and X' y, in w by the product rule.
    along = inverse @ (X.T @ Y - 2 * X.T @ X @ ridge(2.0))
    truth = once | {
        "value": ridge(2.0),
        "argnums": (slope, inverse @ X.T),
        "design": along.sum(),
        "initial": np.zeros((4, 4)),
        "vmap of grad": both,
        "grad of vmap": both.T,
        "vmap of jvp": both,
        "root_vjp": np.arange(4) @ slope,
        "root_jvp": 3 * slope,
        "hessian": 2 * inverse @ inverse @ ridge(2.0),
    }
    return numbers(everything(2.0)), truth


CALLS = ["value", "argnums", "design", "initial", "vmap of grad", "grad of vmap", "vmap of jvp"]
CALLS += ["keywords", "names in another order", "has_aux", "tree with None", "closed over"]
CALLS += ["root_vjp", "root_jvp", "jit inside", "in a loop", "hessian"]


@pytest.mark.parametrize("name", CALLS)
def test_jaxopt_calls(name):
    found, truth = ridge_results()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-10),
        found[name],
        truth[name],
    )


# optimistix: root finding, fixed points, minimisation, least squares.


def heat(y, a):
    """One implicit step of a nonlinear heat equation."""
    left, right = jnp.roll(y, 1), jnp.roll(y, -1)
    return jnp.sin(jnp.arange(6.0, dtype=y.dtype)) + a * (left - 2 * y + right) * (1 + y * y) / 10


def net(y, a):
    hidden = jnp.tanh(a["first"] @ y["a"] + y["b"] + a["bias"])
    return {"a": a["second"] @ hidden, "b": jnp.sin(hidden) / 2}


def himmelblau(y, a):
    return (y[0] ** 2 + y[1] - a[0]) ** 2 + (y[0] + y[1] ** 2 - a[1]) ** 2


def beale(y, a):
    u, v = y
    terms = a[0] - u + u * v, a[1] - u + u * v**2, a[2] - u + u * v**3
    return terms[0] ** 2 + terms[1] ** 2 + terms[2] ** 2


def matyas(y, a):
    return a[0] * (y["u"] ** 2 + y["v"] ** 2) - a[1] * y["u"] * y["v"] - a[2] * y["u"]


def rosenbrock(y, a):
    return jnp.sum((a[0] - y[:-1]) ** 2) + a[1] * jnp.sum((y[1:] - y[:-1] ** 2) ** 2)


def bowl(y, a):
    return y @ a["matrix"] @ y / 2 - jnp.sum(y * a["shift"]) + jnp.sum(y**4) / 4


def residuals(y, a):
    """A nonlinear least-squares problem with a residual that does not vanish."""
    return jnp.stack([y[0] - a[0], y[1] ** 2 - a[1], y[0] * y[1] - a[2], jnp.exp(y[0]) - 2])


def squares(residual):
    return lambda y, a: jnp.sum(residual(y, a) ** 2) / 2


def optimistix_rows(dtype):
    def array(x):
        return jnp.asarray(x, dtype)

    weights = {"first": array(draws_of(1)), "second": array(draws_of(2)), "bias": array(SOFT[:3])}
    three = array([0.7, 1.1, 0.4])
    matrix = array([[2.0, 0.5, 0.0], [0.5, 1.5, 0.2], [0.0, 0.2, 1.0]])
    shape = {"a": np.zeros(3, dtype), "b": np.zeros(3, dtype)}

    def root_of(function):  # y = function(y, a)
        return lambda y, a: jax.tree.map(lambda x, z: z - x, function(y, a), y)

    def sine(y, a):
        return jnp.sin(y) * a / 2 + 1

    def fixed(function, start, at):
        return Row(implicit.fixed_point(function), newton(root_of(function), start), at)

    return {
        "fixed point, sin": fixed(sine, np.ones((), dtype), array(0.8)),
        "fixed point, heat": fixed(heat, np.ones(6, dtype), array(0.3)),
        "fixed point, net": fixed(net, shape, weights),
        "root, sin": rooted(root_of(sine), np.ones((), dtype), array(0.8)),
        "root, heat": rooted(root_of(heat), np.ones(6, dtype), array(0.3)),
        "root, net": rooted(root_of(net), shape, weights),
        "minimise, himmelblau": minimised(
            himmelblau, np.array([3.0, 2.0], dtype), array([11.0, 7.0])
        ),
        "minimise, beale": minimised(beale, np.array([3.0, 0.5], dtype), array([1.5, 2.25, 2.625])),
        "minimise, matyas": minimised(
            matyas, {"u": np.ones((), dtype), "v": np.ones((), dtype)}, three
        ),
        "minimise, rosenbrock": minimised(rosenbrock, np.ones(3, dtype), array([1.0, 20.0])),
        "minimise, bowl": minimised(bowl, np.zeros(3, dtype), {"matrix": matrix, "shift": three}),
        "least squares": minimised(squares(residuals), np.array([0.6, 0.9], dtype), three),
    }


def draws_of(seed):
    return np.random.default_rng(seed).normal(size=(3, 3)) / 3


OPTIMISTIX = ["fixed point, sin", "fixed point, heat", "fixed point, net", "root, sin"]
OPTIMISTIX += ["root, heat", "root, net", "minimise, himmelblau", "minimise, beale"]
OPTIMISTIX += ["minimise, matyas", "minimise, rosenbrock", "minimise, bowl", "least squares"]
OPTIMISTIX = some(OPTIMISTIX)


@functools.cache
def optimistix(promotion):
    with jax.numpy_dtype_promotion(promotion), jax.numpy_rank_promotion("warn"):
        rows = optimistix_rows(np.float64)
        return results({name: rows[name] for name in OPTIMISTIX})


@pytest.mark.parametrize("promotion", ["standard", "strict"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMISTIX)
def test_optimistix(name, mode, promotion):
    compare(optimistix(promotion)[name], mode)


# lineax: solvers, tags, dtypes, regular and singular matrices.

SQUARE = np.array([[2.0, 1.0, 0.3], [0.4, 3.0, -0.5], [-0.2, 0.7, 1.5]])
DEFINITE = SQUARE @ SQUARE.T + np.eye(3)
LOWER, UPPER = np.tril(SQUARE), np.triu(SQUARE)
BAND = np.array([[2.0, 1.0, 0.0], [0.4, 3.0, -0.5], [0.0, 0.7, 1.5]])
DIAGONAL = np.diag([2.0, -3.0, 0.5])
LOW_RANK = np.array([[0.0, 0, 0], [0.3, -1.2, 0.7], [0.9, 0.4, -0.5]])
LOW_DEFINITE = LOW_RANK.T @ LOW_RANK


def iterative(dtype):
    tolerance = 1e-10 if dtype == "float64" else 1e-5
    both = tolerance, tolerance
    return {
        "CG": lx.CG(*both),
        "Normal(CG)": lx.Normal(lx.CG(*both)),
        "GMRES": lx.GMRES(*both),
        "BiCGStab": lx.BiCGStab(*both),
        "LSMR": lx.LSMR(*both),
    }


SYSTEMS: dict[str, tuple] = {
    "AutoLinearSolver(True)": (SQUARE, ()),
    "AutoLinearSolver(True), lower": (LOWER, lx.lower_triangular_tag),
    "AutoLinearSolver(True), definite": (DEFINITE, lx.positive_semidefinite_tag),
    "AutoLinearSolver(True), tridiagonal": (BAND, lx.tridiagonal_tag),
    "AutoLinearSolver(True), diagonal": (DIAGONAL, lx.diagonal_tag),
    "AutoLinearSolver(None)": (SQUARE, ()),
    "AutoLinearSolver(False)": (SQUARE, ()),
    "AutoLinearSolver(False), singular": (LOW_RANK, ()),
    "LU": (SQUARE, ()),
    "QR": (SQUARE, ()),
    "SVD": (SQUARE, ()),
    "SVD, singular": (LOW_RANK, ()),
    "SVD, symmetric and singular": (LOW_DEFINITE, lx.symmetric_tag),
    "Cholesky": (DEFINITE, ()),
    "Cholesky, negative": (-DEFINITE, lx.negative_semidefinite_tag),
    "Normal(Cholesky)": (SQUARE, ()),
    "Triangular, lower": (LOWER, lx.lower_triangular_tag),
    "Triangular, upper": (UPPER, lx.upper_triangular_tag),
    "Triangular, unit diagonal": (
        np.eye(3) + np.tril(SQUARE, -1),
        (lx.lower_triangular_tag, lx.unit_diagonal_tag),
    ),
    "Diagonal": (DIAGONAL, lx.diagonal_tag),
    "Diagonal, singular": (np.diag([2.0, 0.0, 0.5]), lx.diagonal_tag),
    "Tridiagonal": (BAND, lx.tridiagonal_tag),
    "CG": (DEFINITE, ()),
    "CG, tag": (DEFINITE, lx.positive_semidefinite_tag),
    "CG, negative": (-DEFINITE, lx.negative_semidefinite_tag),
    "CG, singular": (LOW_DEFINITE, ()),
    "Normal(CG)": (SQUARE, ()),
    "Normal(CG), singular": (LOW_RANK, ()),
    "GMRES": (SQUARE, ()),
    "GMRES, symmetric": (DEFINITE, lx.symmetric_tag),
    "BiCGStab": (SQUARE, ()),
    "LSMR": (SQUARE, ()),
    "LSMR, singular": (LOW_RANK, ()),
    "default": (SQUARE, ()),
    "default, definite": (DEFINITE, lx.positive_semidefinite_tag),
    "default, singular": (LOW_RANK, ()),
}


def solver_of(name, dtype):
    known: dict[str, Any] = iterative(dtype) | {
        "AutoLinearSolver(True)": lx.AutoLinearSolver(True),
        "AutoLinearSolver(None)": lx.AutoLinearSolver(None),
        "AutoLinearSolver(False)": lx.AutoLinearSolver(False),
        "LU": lx.LU(),
        "QR": lx.QR(),
        "SVD": lx.SVD(),
        "Cholesky": lx.Cholesky(),
        "Normal(Cholesky)": lx.Normal(lx.Cholesky()),
        "Triangular": lx.Triangular(),
        "Diagonal": lx.Diagonal(well_posed=False),
        "Tridiagonal": lx.Tridiagonal(),
        "default": None,
    }
    return known[name.split(", ")[0]]


LINEAX = some(SYSTEMS)
LINEAX_MODES = ["jvp", "vjp", "vmap of jvp", "vmap of vjp"]


@functools.cache
def lineax(dtype):
    """Derivatives in the matrix and the vector, along tangents that keep their kinds.

    A row is the products of the Jacobian from the right and from the left. Rows without a
    derivative, or that are refused, have the error.
    """
    errors: dict = {}

    def derivatives(name, matrix, vector):
        tags = SYSTEMS[name][1]
        solver = solver_of(name, dtype)
        inverse = jnp.asarray(np.linalg.pinv(SYSTEMS[name][0]), dtype)
        decorate = implicit.root(lambda x, a, b: a @ x - b, solver=solver, tags=tags)
        solve = decorate(lambda init, a, b: inverse @ b)

        def of(a, b):
            return solve(None, a, b)

        along = matrix * dtype_of(0.3), matrix @ jnp.ones(3, dtype)
        _, push = jax.jvp(of, (matrix, vector), along)
        pull = jax.vjp(of, matrix, vector)[1](matrix.T @ jnp.arange(1, 4, dtype=dtype))
        return push, pull

    def dtype_of(x):
        return jnp.asarray(x, dtype)

    @jax.jit
    def everything():
        found = {}
        for name in LINEAX:
            matrix = jnp.asarray(SYSTEMS[name][0], dtype)
            vector = matrix @ jnp.asarray([1.0, -2.0, 0.5], dtype)
            try:
                one = derivatives(name, matrix, vector)
                many = jax.vmap(functools.partial(derivatives, name), (None, 0))(
                    matrix, jnp.stack([vector, vector])
                )
                found[name] = one, many
            except Exception as error:
                errors[name] = error
        return found

    with jax.enable_x64(dtype == "float64"):
        return numbers(everything()), errors


def lineax_truth(name):
    matrix = SYSTEMS[name][0]
    inverse = np.linalg.pinv(matrix)
    x = inverse @ matrix @ [1.0, -2.0, 0.5]
    push = inverse @ (matrix @ np.ones(3) - 0.3 * matrix @ x)
    y = inverse.T @ matrix.T @ np.arange(1.0, 4)
    return push, (-np.outer(y, x), y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mode", LINEAX_MODES)
@pytest.mark.parametrize("name", LINEAX)
def test_lineax(name, mode, dtype):
    found, errors = lineax(dtype)
    if name in errors:
        raise errors[name]
    if (name, dtype) == ("CG, singular", "float32") and "vjp" in mode:
        pytest.skip("CG drifts along the null space, so that its solution is not of least norm")
    one, many = found[name]
    results = many if "vmap" in mode else one
    truth = lineax_truth(name)
    got, truth = (results[0], truth[0]) if "jvp" in mode else (results[1], truth[1])
    if (name, dtype) == ("BiCGStab", "float32"):  # it breaks down, and plain lineax raises
        assert all(np.isnan(x).all() for x in jax.tree.leaves(got))
        return
    tolerance = 1e-6 if dtype == "float64" else 3e-3
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(truth), strict=True):
        b = np.broadcast_to(b, a.shape)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())

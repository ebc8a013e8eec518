"""Stochastic bilevel algorithms on quadratics: what they do exactly, in NumPy.

All of it was derived here, in the library's sign convention: q (the library's ``v``) solves
H q = a, and the hypergradient is b - Bᵀ q. With z the inner and x the outer variable,

    g(z, x) = zᵀ H z / 2 + zᵀ B x - zᵀ h
    F(z, x) = zᵀ A z / 2 + zᵀ D x + xᵀ E x / 2 - zᵀ alpha - xᵀ beta
    a = dF/dz = A z + D x - alpha,        b = dF/dx = Dᵀ z + E x - beta.

The inner minimum is z*(x) = H⁻¹ (h - B x), so dz*/dx = -H⁻¹ B, and the chain rule gives
dF(z*(x), x)/dx = b - Bᵀ H⁻¹ a.

**One matrix per algorithm.** An algorithm with constant rates maps the stacked (z, q, x, 1) by a
matrix. Its parts are the three elementary moves

    inner:   z <- z - rho (H z + B x - h)
    linear:  q <- q - eta (H q - a(z, x))
    outer:   x <- x - gamma (b(z, x) - Bᵀ q)

- SOBA makes them all from the old triple: I + sum of (move - I).
- FSLA makes them one after the other, and each sees the last one's result (its STORM corrections
  are zero without noise): outer linear inner.
- AmIGO(N): outer linearᴺ innerᴺ, with q kept from one outer step to the next.
- stocBiO(N, K): q = eta sum_{j=0..K} (I - eta H)ʲ a has K + 1 terms. K + 1 linear moves that start
  at q = 0 give it: outer linear^(K+1) reset innerᴺ.

Without noise the state after k steps is the k-th power of the matrix times the first state. The
linear part M has a spectral radius below 1 exactly where the algorithm converges. For the scalar
example g = mu z²/2 - z x, F = (z - 1)²/2 + kappa x²/2 and SOBA,
det(I - M) = rho² gamma (kappa mu² + 1): the term 1 is that of Bᵀ q, and with q's sign flipped in
the outer move it becomes -1. So if kappa mu² < 1, the flipped recursion has det(I - M) < 0, which
is a real eigenvalue above 1, for all rates.

**Noise.** Independent noise of covariance Q that is added to the state in each step makes the
covariance S <- M S Mᵀ + Q; the discrete Lyapunov equation gives its limit. If the matrix itself is
drawn in each step (random batches), E[s sᵀ] of the state with its 1 obeys the linear recursion
vec <- E[M ⊗ M] vec, whose fixed point is the eigenvector of eigenvalue 1.

**Biases.** (1) K + 1 Neumann terms give q = (I - (I - eta H)^(K+1)) H⁻¹ a, so in the scalar case
the implicit term is wrong by the factor -(1 - eta mu)^(K+1). (2) F2SA with fixed lambda has
z_lambda = argmin F + lambda g and z_hat = argmin g. Subtracting their conditions,
(A + lambda H)(z_lambda - z_hat) = -a(z_hat): its theta direction
b(z_lambda) + lambda Bᵀ (z_lambda - z_hat) has (H + A / lambda)⁻¹ in the place of H⁻¹. In the
scalar example (A = 1) the implicit term is wrong by the factor -1 / (1 + lambda mu). (3) If the
inner minimum moves by delta per outer step and T inner steps follow, the lag obeys
e <- qᵀ (e + delta), q = 1 - rho mu, with the limit qᵀ delta / (1 - qᵀ) (qᵀ: q to the power T).
(4) A randomised Neumann term, K eta (1 - eta mu)ᵏ with k uniform on 0..K-1, has the mean
eta sum_k (1 - eta mu)ᵏ and the second moment (1/K) sum_k (K eta (1 - eta mu)ᵏ)².
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

SPECTRAL_RADII = {
    (1, 0.1, 0.1, 0.01): 0.98524,
    (1, 0.1, 0.1, 0.05): 0.97765,
    (1, 0.1, 0.1, 0.1): 0.98667,
    (1, 0.1, 0.1, 0.3): 1.0045,
    (0.1, 0.1, 0.1, 0.001): 1.0045,
}
"""(mu, kappa, rho, gamma) of the scalar example: SOBA's spectral radius. The last two diverge: an
outer rate must be well below rho mu³."""


class Quadratic(NamedTuple):
    """The numbers of g and F; with a leading axis, one problem per sample of a finite sum."""

    hessian: Any
    mixed: Any
    inner_slope: Any
    outer_hessian: Any
    outer_mixed: Any
    theta_hessian: Any
    outer_slope: Any
    theta_slope: Any


class Rates(NamedTuple):
    """Constant rates: rho of the inner moves, eta of the linear ones, gamma of the outer ones."""

    inner: float
    linear: float
    outer: float


class Exact(NamedTuple):
    """A triple (z, q, x)."""

    params: np.ndarray
    v: np.ndarray
    theta: np.ndarray


def scalar(mu: float = 1.0, kappa: float = 0.1) -> Quadratic:
    """g = mu z²/2 - z x and F = (z - 1)²/2 + kappa x²/2, as arrays of one entry."""
    one, zero = np.ones((1, 1)), np.zeros((1, 1))
    return Quadratic(mu * one, -one, zero[0], one, zero, kappa * one, one[0], zero[0])


def random_quadratic(dim: int = 4, dim_theta: int = 3, seed: int = 0) -> Quadratic:
    """A strongly convex g, and an F that is convex in both variables together."""
    draw = np.random.default_rng(seed).standard_normal
    whole = draw((dim + dim_theta, dim + dim_theta)) / 4
    whole = whole @ whole.T + 0.3 * np.eye(dim + dim_theta)
    rows = draw((dim, dim)) / 3
    return Quadratic(
        rows @ rows.T + 0.6 * np.eye(dim),
        draw((dim, dim_theta)) / 2,
        draw(dim),
        whole[:dim, :dim],
        whole[:dim, dim:],
        whole[dim:, dim:],
        draw(dim),
        draw(dim_theta),
    )


def mean(problems: Quadratic) -> Quadratic:
    """The full-data problem of a finite sum."""
    return Quadratic(*(np.mean(x, 0) for x in problems))


def inner_minimum(p: Quadratic, theta: np.ndarray) -> np.ndarray:
    """The minimiser z*(x) of the inner loss."""
    return np.linalg.solve(p.hessian, p.inner_slope - p.mixed @ theta)


def slopes(p: Quadratic, params: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outer loss's derivatives a and b."""
    a = p.outer_hessian @ params + p.outer_mixed @ theta - p.outer_slope
    return a, p.outer_mixed.T @ params + p.theta_hessian @ theta - p.theta_slope


def hypergradient(p: Quadratic, theta: np.ndarray) -> np.ndarray:
    """The exact derivative of F(z*(x), x)."""
    a, b = slopes(p, inner_minimum(p, theta), theta)
    return b - p.mixed.T @ np.linalg.solve(p.hessian, a)


def solution(p: Quadratic) -> Exact:
    """The z, q and x with zero hypergradient, which is affine in x."""
    size = p.mixed.shape[-1]
    zero = hypergradient(p, np.zeros(size))
    matrix = np.stack([hypergradient(p, e) - zero for e in np.eye(size)], 1)
    theta = np.linalg.solve(matrix, -zero)
    params = inner_minimum(p, theta)
    return Exact(params, np.linalg.solve(p.hessian, slopes(p, params, theta)[0]), theta)


def stacked(at: Exact) -> np.ndarray:
    """The state (z, q, x, 1), which the matrices act on."""
    return np.concatenate([*at, [1.0]])


def _moves(p: Quadratic, rates: Rates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The elementary moves as matrices of (z, q, x, 1)."""
    d, k = p.mixed.shape
    z, q, x, one = slice(0, d), slice(d, 2 * d), slice(2 * d, 2 * d + k), -1
    inner, linear, outer = (np.eye(2 * d + k + 1) for _ in range(3))
    inner[z, z] -= rates.inner * p.hessian
    inner[z, x] -= rates.inner * p.mixed
    inner[z, one] += rates.inner * p.inner_slope
    linear[q, q] -= rates.linear * p.hessian
    linear[q, z] += rates.linear * p.outer_hessian
    linear[q, x] += rates.linear * p.outer_mixed
    linear[q, one] -= rates.linear * p.outer_slope
    outer[x, z] -= rates.outer * p.outer_mixed.T
    outer[x, x] -= rates.outer * p.theta_hessian
    outer[x, q] += rates.outer * p.mixed.T
    outer[x, one] += rates.outer * p.theta_slope
    return inner, linear, outer


def soba(p: Quadratic, rates: Rates, sign: float = 1.0) -> np.ndarray:
    """One step of SOBA; ``sign=-1`` is the wrong sign of q in the outer move."""
    inner, linear, outer = _moves(p, rates)
    d, k = p.mixed.shape
    outer[2 * d : 2 * d + k, d : 2 * d] *= sign
    return inner + linear + outer - 2 * np.eye(len(inner))


def fsla(p: Quadratic, rates: Rates) -> np.ndarray:
    """One step of FSLA without noise: each move sees the last one's result."""
    inner, linear, outer = _moves(p, rates)
    return outer @ linear @ inner


def amigo(p: Quadratic, rates: Rates, inner_steps: int, linear_steps: int) -> np.ndarray:
    """One outer step of AmIGO: inner steps, linear steps from the last q, the outer move."""
    inner, linear, outer = _moves(p, rates)
    power = np.linalg.matrix_power
    return outer @ power(linear, linear_steps) @ power(inner, inner_steps)


def stocbio(p: Quadratic, rates: Rates, inner_steps: int, terms: int) -> np.ndarray:
    """One outer step of stocBiO with ``terms`` Neumann terms (the paper's K + 1)."""
    inner, linear, outer = _moves(p, rates)
    reset = np.eye(len(inner))
    d = p.mixed.shape[0]
    reset[d : 2 * d] = 0
    power = np.linalg.matrix_power
    return outer @ power(linear, terms) @ reset @ power(inner, inner_steps)


def radius(matrix: np.ndarray) -> float:
    """Spectral radius of the linear part: below 1 where the algorithm converges."""
    return float(np.max(np.abs(np.linalg.eigvals(matrix[:-1, :-1]))))


def after(matrix: np.ndarray, start: Exact, num_steps: int) -> Exact:
    """The triple after a number of steps."""
    end = np.linalg.matrix_power(matrix, num_steps) @ stacked(start)
    d = len(start.params)
    return Exact(end[:d], end[d : 2 * d], end[2 * d : -1])


def additive(p: Quadratic, rates: Rates, sd: float) -> np.ndarray:
    """Covariance of a SOBA step's noise: independent, ``sd`` on each entry of the directions."""
    d, k = p.mixed.shape
    each = np.concatenate([np.full(d, rates.inner), np.full(d, rates.linear), np.full(k, rates[2])])
    return np.diag((sd * each) ** 2)


def stationary_covariance(matrix: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The limit of S <- M S Mᵀ + noise."""
    return np.asarray(scipy.linalg.solve_discrete_lyapunov(matrix[:-1, :-1], noise))


def stationary_moments(matrices: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance in the limit where each step draws one of the matrices independently."""
    second = np.mean([np.kron(m, m) for m in matrices], 0)
    values, vectors = np.linalg.eig(second)
    size = len(matrices[0])
    moment = np.real(vectors[:, np.argmin(np.abs(values - 1))].reshape(size, size))
    moment = moment / moment[-1, -1]
    middle = moment[:-1, -1]
    return middle, moment[:-1, :-1] - np.outer(middle, middle)


def neumann_bias(mu: float, eta: float, terms: int) -> float:
    """Relative bias of the implicit term after ``terms`` Neumann terms, scalar."""
    return -((1 - eta * mu) ** terms)


def randomised_neumann(mu: float, eta: float, num: int) -> tuple[float, float]:
    """Mean and variance of K eta (1 - eta mu)ᵏ, where k is uniform on 0..K-1 and K is ``num``."""
    terms = eta * (1 - eta * mu) ** np.arange(num)
    return terms.sum(), np.mean((num * terms) ** 2) - terms.sum() ** 2


def penalty_bias(mu: float, penalty: float) -> float:
    """Relative bias of the implicit term of F2SA with this fixed lambda, scalar example."""
    return -1 / (1 + penalty * mu)


def penalty_hypergradient(p: Quadratic, theta: np.ndarray, penalty: float) -> np.ndarray:
    """F2SA's direction for theta where both inner problems are solved, for any quadratic."""
    low = inner_minimum(p, theta)
    away = np.linalg.solve(p.outer_hessian + penalty * p.hessian, -slopes(p, low, theta)[0])
    return slopes(p, low + away, theta)[1] + penalty * p.mixed.T @ away


def lag(mu: float, rho: float, inner_steps: int, delta: float) -> float:
    """Distance that a warm-started inner loop keeps behind a minimum that moves by ``delta``."""
    kept = (1 - rho * mu) ** inner_steps
    return kept * delta / (1 - kept)


class FiniteSum(NamedTuple):
    """Finite-sum quadratics, with losses for JAX that are means over a batch.

    Attributes:
        inner: ``inner(params, theta, batch)``.
        outer: ``outer(params, theta, batch)``.
        data: The samples; a batch is some rows of it. Inner and outer losses read other fields.
        exact: The solution of the full-data problem.
        full: The full-data problem.
    """

    inner: Any
    outer: Any
    data: Quadratic
    exact: Exact
    full: Quadratic


def finite_sum(
    num: int = 16, dim: int = 3, *, random_curvature: bool = False, seed: int = 0
) -> FiniteSum:
    """``num`` samples of inner and outer quadratics in ``dim`` + ``dim`` variables, as arrays.

    Args:
        num: Samples of both losses.
        dim: Size of params, and of theta.
        random_curvature: Whether H, B and the outer matrices differ between samples too. Otherwise
            only the linear terms do, and differences of gradients are free of noise.
        seed: Of the draws.
    """
    base, draw = random_quadratic(dim, dim, seed), np.random.default_rng(seed + 1).standard_normal

    def samples(x, scale):
        away = draw((num, *x.shape))
        if x.ndim == 2 and x.shape[0] == x.shape[1]:
            away = (away + np.swapaxes(away, 1, 2)) / 2
        return x + scale * (away - away.mean(0))

    scales = Quadratic(*(0.1 * random_curvature if x.ndim == 2 else 1.0 for x in base))
    data = Quadratic(*map(samples, base, scales))

    def inner(params, theta, batch):
        slope = jnp.einsum("nij,j->ni", batch.hessian, params) / 2
        slope = slope + jnp.einsum("nij,j->ni", batch.mixed, theta) - batch.inner_slope
        return jnp.mean(slope @ params)

    def outer(params, theta, batch):
        a = jnp.einsum("nij,j->ni", batch.outer_hessian, params) / 2
        a = a + jnp.einsum("nij,j->ni", batch.outer_mixed, theta) - batch.outer_slope
        b = jnp.einsum("nij,j->ni", batch.theta_hessian, theta) / 2 - batch.theta_slope
        return jnp.mean(a @ params + b @ theta)

    return FiniteSum(inner, outer, data, solution(mean(data)), mean(data))


def as_tree(x: Any) -> dict[str, Any]:
    """An array of three or more entries as a pytree of two leaves of different rank."""
    return {"bias": x[0], "weights": (x[1:],)}


def as_array(tree: dict[str, Any]) -> jax.Array:
    """The array of a pytree that ``as_tree`` made."""
    return jnp.concatenate([tree["bias"][None], tree["weights"][0]])


def finite_sum_of_trees(num: int = 16, dim: int = 3, **kwargs: Any) -> FiniteSum:
    """``finite_sum`` whose params and theta are pytrees, and whose batches are dicts."""
    flat = finite_sum(num, dim, **kwargs)

    def of_trees(loss):
        def of_tree(params, theta, batch):
            return loss(as_array(params), as_array(theta), Quadratic(**batch))

        return of_tree

    data: Any = flat.data._asdict()
    return flat._replace(inner=of_trees(flat.inner), outer=of_trees(flat.outer), data=data)


class Blocks(NamedTuple):
    """The state of many scalar blocks: z, q and misses ``(M,)``, and x."""

    params: np.ndarray
    v: np.ndarray
    misses: np.ndarray
    theta: float


def blocks_start(num: int) -> Blocks:
    """All variables at zero."""
    return Blocks(np.zeros(num), np.zeros(num), np.zeros(num), 0.0)


def blocks_step(
    mus: np.ndarray, rates: Rates, state: Blocks, sampled: np.ndarray, kappa: float = 0.1
) -> Blocks:
    """One step of BSVRB with tracked products, alpha = beta = 1, gamma = 0, no noise.

    Block i is the scalar example with its own mu; the outer loss is the mean over the blocks.
    Sampled blocks move by (misses + 1) times a step, others not at all, and x descends the mean
    over the sampled blocks. All see the old state.
    """
    z, q, x = state.params[sampled], state.v[sampled], state.theta
    times = state.misses[sampled] + 1
    params, v, misses = state.params.copy(), state.v.copy(), state.misses + 1
    params[sampled] -= rates.inner * times * (mus[sampled] * z - x)
    v[sampled] -= rates.linear * times * (mus[sampled] * q - (z - 1))
    misses[sampled] = 0
    return Blocks(params, v, misses, float(x - rates.outer * (kappa * x + np.mean(q))))


def blocks_as_one(mus: np.ndarray, kappa: float = 0.1) -> Quadratic:
    """All blocks as one problem whose SOBA step is ``blocks_step`` with every block sampled.

    The outer loss of the one problem is the mean, but a block's q solves its own system, without
    the factor 1/M. Therefore the factor is in Bᵀ's place and not in a's: ``mixed`` serves the inner
    move, and ``blocks_soba`` divides the outer move's by M.
    """
    num = len(mus)
    return Quadratic(
        np.diag(mus),
        -np.ones((num, 1)),
        np.zeros(num),
        np.eye(num),
        np.zeros((num, 1)),
        np.full((1, 1), kappa),
        np.ones(num),
        np.zeros(1),
    )


def blocks_soba(mus: np.ndarray, rates: Rates, kappa: float = 0.1) -> np.ndarray:
    """The matrix of (z, q, x, 1) of one step with every block sampled."""
    return soba(blocks_as_one(mus, kappa), rates, sign=1 / len(mus))

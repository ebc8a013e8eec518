"""Samples of a sampler's problem, and the inverse of its steps."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import unroll
from unrollgrad.samplers import _step
from unrollgrad.types import Key, Segment, Theta, UnrolledProblem

__all__ = ["inverse", "sample"]


def sample(problem: UnrolledProblem, key: Key, theta: Theta) -> jax.Array:
    """Draws one sample, the x_0 of the episode that ``key`` makes.

    It is the sample that an estimator's call with this key sees, if it begins an episode. Use it
    inside ``jit``, with ``jax.vmap`` over split keys for many samples. Costs ``num_steps``
    evaluations of the network.

    Args:
        problem: A sampler's problem.
        key: The episode's key.
        theta: The network's parameters.

    Raises:
        TypeError: If the problem was not made by a sampler.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> problem = ug.samplers.flow(
        ...     lambda theta, x, t: theta - x, num_steps=10, reward=jnp.sum, sample_shape=(2,))
        >>> draw = jax.jit(lambda key: ug.samplers.sample(problem, key, 1.0))
        >>> jax.vmap(draw)(jax.random.split(jax.random.key(0), 100)).shape
        (100, 2)
    """
    _step.step_of("sample", problem)
    key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
    horizon = inner_loop.static_horizon(problem, "sample")
    segment = Segment(problem, unroll.new_episode(horizon, key, horizon), horizon)
    return _step.finish(segment, theta, _step.begin(segment, theta)).x


def inverse(problem: UnrolledProblem, iterations: int = 1) -> Callable[..., Any]:
    """The inverse of a sampler's step, for ``bptt(problem, remat="reverse", inverse=...)``.

    A step x' = keep x + move output(x) + noise z is solved for x by fixed-point iterations that
    begin at x'. With one iteration it is DDIM inversion, the Euler step of the probability-flow ODE
    backwards, and the gradient is AdjointDPM's: that of the continuous process, which differs from
    the gradient of the sampler by O(h) with steps of size h. With n iterations the difference is
    O(h^n), and with noise in the steps, which is drawn again, O(h^(n - 1/2)).

    Costs ``iterations`` evaluations of the network per step.

    Args:
        problem: A sampler's problem. Every step must keep a part of x: the first one of a
            memoryless flow keeps none, and a later one may keep none if there is much noise.
        iterations: Fixed-point iterations (n).

    Returns:
        ``inverse(key, theta, state, t)``, the state before step t.

    Raises:
        TypeError: If the problem was not made by a sampler.
        ValueError: If a step keeps no part of x, or one of the size of float32's rounding
            (``FAINT``); or ``iterations`` is below one. Traced numbers are not checked.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> problem = ug.samplers.ddim(lambda theta, x, t: theta * x, ug.samplers.vp(),
        ...     num_steps=10, reward=jnp.sum, sample_shape=(2,))
        >>> back = ug.samplers.inverse(problem, iterations=2)
        >>> adjoint = ug.bptt(problem, remat="reverse", inverse=back)

    References:
        Pan et al., AdjointDPM, ICLR 2024, arXiv:2307.10711.
    """
    step = _step.step_of("inverse", problem)
    iterations = arguments.positive_int("iterations", iterations)
    _check_invertible(step)

    def before(key, theta, state, t):
        c = step.coefficients(t, state.x.dtype)
        target = state.x
        if c.noise is not None:
            target = target - c.noise * jax.random.normal(key, target.shape, target.dtype)

        def improved(_, x):
            return (target - c.move * step.output(theta, state._replace(x=x), c)) / c.keep

        return state._replace(x=jax.lax.fori_loop(0, iterations, improved, state.x))

    return before


FAINT = 3e-4
"""About sqrt(eps): dividing by a smaller ``keep`` leaves less than half of float32's digits."""


def _check_invertible(step: _step.SamplerStep) -> None:
    keep = _step.all_coefficients(step).keep
    if isinstance(keep, jax.core.Tracer):
        return
    lost = np.flatnonzero(~(np.abs(keep) >= FAINT))
    if lost.size:
        raise ValueError(
            f"step {lost[0]} of this sampler's steps 0 to {step.num_steps - 1} forgets x: it keeps "
            f"{float(keep[lost[0]]):.1g} of it, so that it has no inverse. Use "
            'bptt(problem, remat="step"), whose memory grows by one latent per step.'
        )

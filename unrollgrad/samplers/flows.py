"""The sampler of a flow-matching model, deterministic or with noise, as an inner loop."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, inner_loop
from unrollgrad.samplers import _step
from unrollgrad.types import Numeric, UnrolledProblem

__all__ = ["Noise", "flow"]

Noise = Literal["none", "memoryless"] | Numeric | Callable[[Numeric], Numeric]
"""The noise of a flow's steps: none, memoryless, a constant sigma or ``sigma(t)``."""


def flow(
    velocity: Callable[..., Any],
    *,
    num_steps: int,
    reward: Callable[..., Any],
    sample_shape: tuple[int, ...],
    noise: Noise = "none",
    condition: Any = None,
) -> UnrolledProblem:
    """A flow model's sampler as an inner loop; its loss is minus the sample's reward.

    Time t runs from 0 (noise) to 1 (data), and a latent is t data + (1 - t) noise. With v =
    velocity(theta, x, t, condition) the sampler is dx = v dt, or with noise the process of the same
    marginal laws dx = (v + sigma^2/(2 (1 - t)) (t v - x)) dt + sigma dB.

    - ``"none"``: Euler steps of h = 1/num_steps.
    - ``"memoryless"``: sigma^2 = 2 (1 - t)/t, so dx = (2 v - x/t) dt + sigma dB, whose sample is
      independent of the initial noise; ``adjoint_matching`` needs that. Steps integrate the linear
      part and the noise exactly (exponential Euler), so that they hold at t = 0 too.
    - A number or a function ``sigma(t)``: Euler-Maruyama steps with this sigma, finite on [0, 1).

    All are of first order in h. J(theta) = -E[reward]; the step losses are zero.

    Args:
        velocity: ``velocity(theta, x, t, condition)`` predicts data minus noise, in x's shape.
        num_steps: Steps (T), the problem's horizon.
        reward: ``reward(x, condition)``, a scalar, maximised.
        sample_shape: The shape of x, as in ``ddim``.
        noise: ``"none"``, ``"memoryless"``, a number or a function of t.
        condition: None, a fixed pytree, or a function of a key, as in ``ddim``.

    Returns:
        A problem with ``horizon=num_steps``, whose states are ``samplers.SamplerState``.

    Raises:
        TypeError: If a function cannot be called as above.
        ValueError: If a number is out of range or ``noise`` is another word.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> problem = ug.samplers.flow(
        ...     lambda theta, x, t: theta - x, num_steps=10, reward=lambda x: x, sample_shape=())
        >>> x = ug.samplers.sample(problem, jax.random.key(0), jnp.array(3.0))
        >>> x.shape
        ()

    References:
        Lipman et al., Flow matching for generative modeling, ICLR 2023, arXiv:2210.02747; noise:
        Domingo-Enrich et al., Adjoint matching, ICLR 2025, arXiv:2409.08861.
    """
    goal = _step.target(num_steps, reward, sample_shape, condition)
    network = _step.conditional("velocity", velocity, condition, ("theta", "x", "t"))
    forward = _rule(noise)

    def coefficients(t, dtype):
        time = jnp.asarray(t, dtype) / goal.num_steps
        later = (jnp.asarray(t, dtype) + 1) / goal.num_steps
        keep, move, scale = forward(time, later)
        return _step.Coefficients(
            time=time,
            keep=jnp.asarray(keep, dtype),
            move=jnp.asarray(move, dtype),
            noise=None if scale is None else jnp.asarray(scale, dtype),
            data_keep=jnp.ones((), dtype),
            data_move=1 - time,
            alpha=time,
            sigma=1 - time,
        )

    return _step.sampler(
        _step.SamplerStep(network, coefficients, goal.num_steps), goal, lambda dtype: 1
    )


def _rule(noise: Noise) -> Callable[[jax.Array, jax.Array], tuple[Numeric, Numeric, Any]]:
    """The step rule ``(t, t') -> (keep, move, noise)``."""
    if isinstance(noise, str):
        rules = {"none": _euler, "memoryless": _memoryless}
        if noise not in rules:
            raise ValueError(
                f'`noise` must be "none", "memoryless", a number or a function of t; got {noise!r}.'
            )
        return rules[noise]
    if callable(noise):
        inner_loop.check_call("noise", noise, t=None)
        return _euler_maruyama(noise)
    arguments.number("noise", noise)
    return _euler_maruyama(lambda t: noise)


def _euler(t, later):
    return 1, later - t, None


def _memoryless(t, later):
    """Integrates d(t x) = 2 t v dt + sqrt(2 t (1 - t)) dB with v constant during the step."""
    step = later - t
    variance = (later + t) - 2 / 3 * (later**2 + later * t + t**2)  # times the step
    return t / later, (later + t) * step / later, jnp.sqrt(step * variance) / later


def _euler_maruyama(sigma: Callable[[Numeric], Numeric]):
    def rule(t, later):
        step, scale = later - t, sigma(t)
        pull = step * scale**2 / (2 * (1 - t))
        return 1 - pull, step + pull * t, scale * jnp.sqrt(step)

    return rule

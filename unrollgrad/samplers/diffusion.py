"""The DDIM sampler of a diffusion model as an inner loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments
from unrollgrad._core import eager
from unrollgrad.samplers import _step, schedules
from unrollgrad.types import Numeric, UnrolledProblem

__all__ = ["ddim"]


def ddim(
    denoiser: Callable[..., Any],
    schedule: schedules.Schedule,
    *,
    num_steps: int,
    reward: Callable[..., Any],
    sample_shape: tuple[int, ...],
    eta: Numeric = 0.0,
    condition: Any = None,
) -> UnrolledProblem:
    """A diffusion model's DDIM sampler as an inner loop; its loss is minus the sample's reward.

    ``init`` draws the noise x_T and the condition. Step number k = num_steps, ..., 1 goes from time
    t = k/num_steps to (k - 1)/num_steps: with e = denoiser(theta, x, t, condition), the predicted
    noise, and x0 = (x - sigma e)/alpha, the predicted sample, the next x is alpha' x0 +
    sqrt(sigma'^2 - s^2) e + s z. Here s = eta sigma'/sigma sqrt(sigma^2 - (alpha/alpha')^2
    sigma'^2), at most sigma', where a large eta draws all noise anew. So eta = 0 is deterministic
    (Euler steps of the probability-flow ODE in x/alpha against sigma/alpha) and eta = 1 the DDPM
    sampler, which forgets its initial noise.

    J(theta) = -E[reward]; the step losses are zero. ``bptt`` of this problem is DRaFT, and the
    manual's page on reward gradients has a table of all methods. One episode costs ``num_steps``
    denoiser evaluations.

    Args:
        denoiser: ``denoiser(theta, x, t, condition)`` predicts the noise in x, in x's shape; any
            network. t is a scalar in [0, 1]. Theta may be all of its weights or a part
            (``samplers.lora``).
        schedule: ``schedule(t) -> (alpha, sigma)`` such as ``samplers.vp()``, on [0, 1].
        num_steps: Denoising steps (T), the problem's horizon.
        reward: ``reward(x0, condition)``, a scalar, maximised. Estimators with backpropagation
            differentiate it.
        sample_shape: The shape of x. A batch axis may be part of it: then network and reward take a
            batch. Else ``average`` makes the batch.
        eta: The amount of noise in the steps, at least 0.
        condition: None, a fixed pytree of arrays, or a function of a key that draws one for each
            episode, such as a prompt's embedding. If it is None, ``denoiser`` and ``reward`` may do
            without this argument.

    Returns:
        A problem with ``horizon=num_steps``, whose states are ``samplers.SamplerState``.

    Raises:
        TypeError: If a function cannot be called as above.
        ValueError: If a number is out of range, or ``schedule(1.0)`` has alpha 0.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> problem = ug.samplers.ddim(
        ...     lambda theta, x, t: jnp.tanh(theta * x), ug.samplers.vp(), num_steps=10,
        ...     reward=lambda x0: -jnp.sum((x0 - 1.0) ** 2), sample_shape=(3,))
        >>> draft = ug.bptt(problem, last=2)
        >>> estimate, _ = draft.estimate(jax.random.key(0), 1.0, draft.init(jax.random.key(1), 1.0))

    References:
        Song, Meng, Ermon, Denoising diffusion implicit models, ICLR 2021, arXiv:2010.02502.
    """
    goal = _step.target(num_steps, reward, sample_shape, condition)
    network = _step.conditional("denoiser", denoiser, condition, ("theta", "x", "t"))
    arguments.number("eta", eta)
    noisy = isinstance(eta, jax.core.Tracer) or eta > 0
    _check_end(schedule)

    def coefficients(t, dtype):
        time = (goal.num_steps - jnp.asarray(t, dtype)) / goal.num_steps
        later = (goal.num_steps - 1 - jnp.asarray(t, dtype)) / goal.num_steps
        alpha, sigma = schedules.at(schedule, time, dtype)
        alpha_next, sigma_next = schedules.at(schedule, later, dtype)
        noise, along = None, sigma_next
        if noisy:
            # In units of sigma_next: the noise of DDPM is sqrt(1 - less^2), and what is left of
            # the old noise 1 - eta^2 (1 - less^2), written so that it is less^2 for eta = 1.
            amount = jnp.asarray(eta, dtype) if isinstance(eta, jax.Array) else float(eta)
            less = alpha * sigma_next / (alpha_next * sigma)
            drawn = amount * schedules.root((1 - less) * (1 + less))
            noise = sigma_next * jnp.minimum(drawn, 1)
            along *= schedules.root((1 - amount) * (1 + amount) + (amount * less) ** 2)
        keep = alpha_next / alpha
        return _step.Coefficients(
            time=time,
            keep=keep,
            move=along - keep * sigma,
            noise=noise,
            data_keep=1 / alpha,
            data_move=-sigma / alpha,
            alpha=alpha,
            sigma=sigma,
        )

    def scale(dtype):
        alpha, sigma = schedules.at(schedule, jnp.ones((), dtype), dtype)
        return jnp.sqrt(alpha**2 + sigma**2)

    return _step.sampler(_step.SamplerStep(network, coefficients, goal.num_steps), goal, scale)


def _check_end(schedule: schedules.Schedule) -> None:
    """Raises unless the schedule returns two scalars, with an alpha above 0 at t = 1."""
    shown = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.float32))
    scalars = [np.shape(x) == () for x in shown] if isinstance(shown, tuple) else []
    if scalars != [True, True]:
        raise TypeError(
            "`schedule(t)` must return two scalars (alpha, sigma); got "
            f"{jax.tree.map(arguments.describe, shown)}. See samplers.vp."
        )
    alpha, _ = eager.known(schedule, np.float32(1.0))
    if not isinstance(alpha, jax.core.Tracer) and not float(alpha) > 0:
        raise ValueError(
            f"`schedule(1.0)` has alpha={float(alpha)}; DDIM's prediction of the sample divides by "
            "alpha. Stop a little earlier, with schedule=lambda t: yours(0.999 * t), or use "
            "samplers.flow, which predicts a velocity."
        )

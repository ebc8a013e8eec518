"""Reward gradients through some of a sampler's steps: DRaFT-LV, and DRTune's linear skip path."""

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import mesh_axes, unroll
from unrollgrad._core.descriptions import described
from unrollgrad.estimators import backprop
from unrollgrad.estimators._window import estimate_of, made_by, nothing, windowed
from unrollgrad.samplers import _step
from unrollgrad.types import GradientEstimator, UnrolledProblem

__all__ = ["draft_lv", "skip_path"]


@described
def draft_lv(
    problem: UnrolledProblem, num_noised: int, include_base: bool = True
) -> GradientEstimator:
    """DRaFT-LV: the gradient through the last step, averaged over noised copies of the sample.

    The sample x_0 is noised to the level of the last step, x^i = alpha_1 x_0 + sigma_1 z_i, and
    denoised in one step; ``grad`` is d/dtheta of the mean of minus the rewards of these predictions
    (and of x_0), with x_0 and the latent before the last step held constant. It is biased: the
    influence of theta through earlier steps is dropped, as in ``bptt(problem, last=1)``.

    Variance: Var(E[g | x_0]) + E[Var(g | x_0)]/n for the n copies alone. So it can help by at most
    1 + q, q = sigma_1^2/(alpha_1^2 s^2) for data of standard deviation s: with few steps or narrow
    data. Time: T denoiser evaluations and 1 + n more (n if the base is left out) with a backward
    pass. Memory: what those 1 + n evaluations compute, as one batch.

    Args:
        problem: A sampler's problem.
        num_noised: Noised copies of the sample (n).
        include_base: Whether the gradient at the sample itself is one of the terms.

    Returns:
        An estimator with ``truncation=None``; its ``loss`` is minus the reward of the sample.

    Raises:
        TypeError: If the problem was not made by a sampler.
        ValueError: If ``num_noised`` is below one.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> problem = ug.samplers.ddim(lambda theta, x, t: theta * x, ug.samplers.vp(),
        ...     num_steps=4, reward=lambda x: -jnp.sum(x**2), sample_shape=(2,))
        >>> estimator = ug.samplers.draft_lv(problem, 2)
        >>> estimator
        draft_lv(2)

    References:
        Clark et al., Directly fine-tuning diffusion models on differentiable rewards, ICLR 2024,
        arXiv:2309.17400.
    """
    step = _step.step_of("draft_lv", problem)
    num_noised = arguments.positive_int("num_noised", num_noised)
    horizon = inner_loop.static_horizon(problem, "draft_lv")

    def run(segment, theta, carried):
        head, tail = backprop.cut(segment, horizon - 1)
        latent = _step.finish(head, theta, _step.begin(segment, theta))
        fixed = _step.finish(tail, theta, latent)
        c = step.coefficients(horizon - 1, latent.x.dtype)
        z = jax.random.normal(
            unroll.noise_key(segment.episode, 0), (num_noised, *latent.x.shape), latent.x.dtype
        )

        def value(theta, state):
            return unroll.evaluate(problem, segment.episode, theta, state)

        def loss(theta):
            def noised(z):
                copy = fixed._replace(x=c.alpha * fixed.x + c.sigma * z)
                return value(theta, step.predicted(theta, copy, c))

            terms = jax.vmap(noised)(z)
            if not include_base:
                return jnp.mean(terms), value(theta, fixed)
            base = value(theta, _step.finish(tail, theta, latent))
            return (base + jnp.sum(terms)) / (1 + num_noised), base

        with backprop.no_while_loop("draft_lv"):
            grad, base = jax.grad(loss, has_aux=True)(theta)
        return estimate_of(grad, base, horizon), None

    fingerprint = made_by("draft_lv", problem, num_noised=num_noised, include_base=include_base)
    return windowed(problem, fingerprint, None, nothing, run)


@described
def skip_path(
    problem: UnrolledProblem, steps: int = 3, *, early_stop: float = 0.4
) -> GradientEstimator:
    """DRTune: the gradient along a sampler's linear skip path, through some of its steps.

    The network's *input* is held constant at every step, while the latent's linear recursion x' =
    keep x + move output + noise stays differentiable. The reward is that of the network's
    prediction of the sample at a stop step, drawn from the last ``round(early_stop T)`` steps; of
    the evaluations up to it, ``steps`` equally spaced ones, with a random offset, are
    differentiated: ``grad`` = -sum_k w_k (d output_k/d theta)^T r'(x0), with w_k the product of
    move at k and of keep after k.

    Biased, since no Jacobian of the network with respect to its input enters; for that reason it
    stays bounded where ``bptt`` explodes. With ``early_stop=0`` the stop step is the last one, the
    choice of FlowBP-Sparse. Time: T network evaluations (an early stop saves none here) and
    ``steps`` + 1 more, ``steps`` with a backward pass. Memory: T latents and one evaluation.

    Args:
        problem: A sampler's problem.
        steps: The number of differentiated evaluations (K).
        early_stop: The share of the steps, at the end, among which the stop step is drawn.

    Returns:
        An estimator with ``truncation=None``; its ``loss`` is minus the reward of the prediction.

    Raises:
        TypeError: If the problem was not made by a sampler.
        ValueError: If ``early_stop`` is outside [0, 1), or there may be fewer steps than ``steps``
            before a stop.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> problem = ug.samplers.ddim(lambda theta, x, t: theta * x, ug.samplers.vp(),
        ...     num_steps=10, reward=lambda x: -jnp.sum(x**2), sample_shape=(2,))
        >>> ug.samplers.skip_path(problem, 3)
        skip_path(3)

    References:
        Wu et al., Deep reward supervisions for tuning text-to-image diffusion models, ECCV 2024,
        arXiv:2405.00760. ``early_stop=0``: FlowBP, 2026, arXiv:2606.11075.
    """
    step = _step.step_of("skip_path", problem)
    horizon = inner_loop.static_horizon(problem, "skip_path")
    steps = arguments.positive_int("steps", steps)
    if not 0 <= early_stop < 1:
        raise ValueError(f"`early_stop` must be in [0, 1); got {early_stop}.")
    stops = max(1, round(early_stop * horizon))
    if horizon - stops + 1 < steps:
        raise ValueError(
            f"the earliest stop leaves {horizon - stops + 1} evaluations, fewer than steps={steps} "
            f"(num_steps={horizon}, early_stop={early_stop}). Lower one of the two."
        )

    def run(segment, theta, carried):
        last, latents = _step.trajectory(segment, theta)
        for_stop, for_offset = jax.random.split(unroll.noise_key(segment.episode, 0))
        stop = horizon - 1 - jax.random.randint(for_stop, (), 0, stops)
        stride = (stop + 1) // steps
        first = jax.random.randint(for_offset, (), 0, stride)
        dtype = last.x.dtype

        def at(k):
            return last._replace(x=latents[k]), step.coefficients(k, dtype)

        def value(theta, state):
            return unroll.evaluate(problem, segment.episode, theta, state)

        predicted = step.predicted(theta, *at(stop))
        with backprop.no_while_loop("skip_path"):
            loss, (grad, slope) = jax.value_and_grad(
                lambda theta, x: value(theta, predicted._replace(x=x)), argnums=(0, 1)
            )(theta, predicted.x)
            names = mesh_axes.axes((segment.episode.key, theta))
            weights, grad = _weights(step, horizon, stop, dtype), mesh_axes.over(names, grad)

            def add(i, grad):
                k = first + i * stride
                back = jax.vjp(lambda theta: step.output(theta, *at(k)), theta)[1]
                return jax.tree.map(jnp.add, grad, back(weights[k] * slope)[0])

            grad = jax.lax.fori_loop(0, steps, add, grad)
        return estimate_of(grad, loss, horizon), None

    fingerprint = made_by("skip_path", problem, steps=steps, early_stop=early_stop)
    return windowed(problem, fingerprint, None, nothing, run)


def _weights(step: _step.SamplerStep, horizon: int, stop: jax.Array, dtype) -> jax.Array:
    """The factor of each step's output in the prediction of the sample at step ``stop``."""
    places = jnp.arange(horizon)
    c = jax.vmap(lambda t: step.coefficients(t, dtype)._replace(noise=None))(places)
    keep = jnp.where(places < stop, c.keep, 1)
    later = jnp.cumprod(keep[::-1])[::-1]  # the product of keep from each step on
    later = jnp.append(later[1:], jnp.ones((), dtype))
    return jnp.where(places == stop, c.data_move[stop], c.data_keep[stop] * c.move * later)

"""Adjoint matching: sampling from the base model's law tilted by a reward."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import mesh_axes, unroll
from unrollgrad._core.descriptions import described
from unrollgrad.estimators import backprop
from unrollgrad.estimators._window import estimate_of, made_by, nothing, windowed
from unrollgrad.samplers import _step
from unrollgrad.types import GradientEstimator, Numeric, Theta, UnrolledProblem

__all__ = ["adjoint_matching"]


@described
def adjoint_matching(
    problem: UnrolledProblem,
    base: Theta,
    reward_scale: Numeric,
    *,
    adjoint: Literal["lean", "basic"] = "lean",
    regression_steps: int | None = None,
) -> GradientEstimator:
    """Adjoint matching: towards the law p_base(x) exp(reward_scale reward(x)), not the best sample.

    An episode samples with theta. A step of the model with mean m_theta(x) and noise s has the
    control u = (m_theta - m_base)/s. The lean adjoint runs back through the base model alone,

        a = -reward_scale r'(x_0) at the end, then a <- (d m_base/d x)^T a, step by step,

    and ``grad`` = d/dtheta of 1/2 sum_k |u_k(x_k) + s_k a_{k+1}|^2, with samples and adjoints held
    constant. Its fixed point is the optimal control, whose samples have the tilted law if the noise
    is memoryless: ``flow(noise="memoryless")`` or ``ddim(eta=1)``. With other noise only a part of
    the tilt is reached (for Gaussian data and a linear reward the share of the sample's variance
    that the noise of the steps made).

    The basic adjoint adds the derivatives of u: a <- d/dx (1/2 |u|^2 + a^T m_theta). Then ``grad``
    is the gradient of -reward_scale reward + 1/2 sum_k |u_k|^2 along the episode. It has the same
    fixed point, and a larger variance away from it. At theta = base both are ``reward_scale`` times
    the gradient of ``bptt`` through the steps that have noise. A step without noise is not trained:
    its output stays the base's. In ``flow(noise="memoryless")`` every step has noise; in
    ``ddim(eta=1)`` all but the last have, if sigma(0) = 0.

    A dependence of ``problem.evaluate`` on theta itself, such as a penalty, counts ``reward_scale``
    times too.

    Time: T network evaluations; T of the base (basic: and of theta) with a backward pass through x;
    ``regression_steps`` with one through theta. Memory: 3 T latents and one evaluation.

    Args:
        problem: A sampler's problem with noise.
        base: The parameters with which the network is the base model, of theta's structure (for
            ``lora`` the theta at the start).
        reward_scale: The factor of the reward (lambda): the larger, the farther from the base. If x
            is a batch and the reward a mean over it, the tilt of one sample is
            ``reward_scale``/batch.
        adjoint: ``"lean"`` or ``"basic"``.
        regression_steps: Steps of each episode in the regression, drawn without replacement and
            weighted so that the mean is the sum over all. Default: all.

    Returns:
        An estimator with ``truncation=None``; its ``loss`` is minus the reward of the sample.

    Raises:
        TypeError: If the problem was not made by a sampler.
        ValueError: If none of its steps has noise, ``adjoint`` is another word,
            ``regression_steps`` is outside 1 to T, or ``base`` differs from theta in structure or
            shapes.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> problem = ug.samplers.flow(lambda theta, x, t: theta - x, num_steps=10,
        ...     reward=jnp.sum, sample_shape=(2,), noise="memoryless")
        >>> matching = ug.samplers.adjoint_matching(problem, 0.0, 1.0)
        >>> state = matching.init(jax.random.key(1), 0.0)
        >>> estimate, state = matching.estimate(jax.random.key(0), 0.0, state)

    References:
        Domingo-Enrich et al., Adjoint matching, ICLR 2025, arXiv:2409.08861.
    """
    step = _step.step_of("adjoint_matching", problem)
    horizon = inner_loop.static_horizon(problem, "adjoint_matching")
    base, chosen = _checked(step, base, adjoint, regression_steps, horizon)
    arguments.number("reward_scale", reward_scale)

    def run(segment, theta, carried):
        def terminal(theta, x):
            return unroll.evaluate(problem, segment.episode, theta, last._replace(x=x))

        last, latents = _step.trajectory(segment, theta)
        names = mesh_axes.axes((segment.episode.key, theta))
        with backprop.no_while_loop("adjoint_matching"):
            loss, slopes = jax.value_and_grad(terminal, argnums=(0, 1))(theta, last.x)
            slopes = jax.tree.map(lambda g: jnp.asarray(reward_scale, g.dtype) * g, slopes)
            direct, slope = mesh_axes.over(names, slopes)
            walk = functools.partial(_ADJOINTS[adjoint], step, (theta, base), last)
            _, matched = jax.lax.scan(
                walk, slope, (jnp.arange(horizon, dtype=jnp.int32), latents), reverse=True
            )
            if chosen < horizon:
                key = unroll.noise_key(segment.episode, 0)
                places = jax.random.choice(key, horizon, (chosen,), replace=False)
                matched = jax.tree.map(lambda x: x[places], matched)
            grad = _regression(step, theta, last, matched, names)
        grad = jax.tree.map(lambda d, g: d + (horizon / chosen * g).astype(g.dtype), direct, grad)
        return estimate_of(grad, loss, horizon), None

    def check(theta):
        differences = arguments.leaf_differences(theta, base, "base")
        if differences or jax.tree.structure(theta) != jax.tree.structure(base):
            raise ValueError(
                "`base` must have theta's structure, shapes and dtypes; expected -> got:\n"
                + ("\n".join(differences) or f"{jax.tree.structure(base)}")
            )

    fingerprint = made_by(
        "adjoint_matching", problem, adjoint=adjoint, regression_steps=regression_steps
    )
    return windowed(problem, fingerprint, None, nothing, run, check)


class _Matched(NamedTuple):
    """What the regression needs of one step.

    Attributes:
        t: The step's number.
        x: The latent before it.
        base: The base network's output there.
        adjoint: The adjoint after it.
    """

    t: jax.Array
    x: jax.Array
    base: jax.Array
    adjoint: jax.Array


def _lean(step, thetas, state, after, inputs):
    """One step back through the base model: the adjoint before it, and what was matched."""
    t, x = inputs
    c = step.coefficients(t, x.dtype)

    def output(x):
        return step.output(thetas[1], state._replace(x=x), c)

    out, back = jax.vjp(output, x)
    return c.keep * after + back(c.move * after)[0], _Matched(t, x, out, after)


def _basic(step, thetas, state, after, inputs):
    """One step back through the model that samples, and through the cost of its control."""
    t, x = inputs
    c = step.coefficients(t, x.dtype)

    def cost(x):
        base, own = (step.output(theta, state._replace(x=x), c) for theta in thetas[::-1])
        control = _per_noise(c) * (own - base)
        mean = c.keep * x + c.move * own
        return 0.5 * jnp.sum(control**2) + jnp.sum(after * mean), base

    before, base = jax.grad(cost, has_aux=True)(x)
    return before, _Matched(t, x, base, after)


_ADJOINTS = {"lean": _lean, "basic": _basic}


def _regression(step, theta, state, matched, names):
    """The gradient of the matching loss, step by step."""

    def add(total, one):
        c = step.coefficients(one.t, one.x.dtype)

        def loss(theta):
            out = step.output(theta, state._replace(x=one.x), c)
            control = _per_noise(c) * (out - one.base)
            return 0.5 * jnp.sum((control + c.noise * one.adjoint) ** 2)

        grad = jax.grad(loss)(theta)
        return jax.tree.map(jnp.add, total, mesh_axes.over(names, grad)), None

    zeros = mesh_axes.over(names, jax.tree.map(jnp.zeros_like, theta))
    return jax.lax.scan(add, zeros, matched)[0]


def _per_noise(c: _step.Coefficients) -> jax.Array:
    """The control of a unit of output; 0 in a step without noise, which cannot be controlled."""
    assert c.noise is not None
    still = c.noise == 0
    return jnp.where(still, 0, c.move / jnp.where(still, 1, c.noise))


def _checked(step, base, adjoint, regression_steps, horizon):
    """The base parameters as arrays, and the number of regression steps."""
    noise = _step.all_coefficients(step).noise
    if noise is None or not (isinstance(noise, jax.core.Tracer) or np.any(noise)):
        raise ValueError(
            "`adjoint_matching` needs a sampler with noise, since no step of this one has any "
            f"(num_steps={step.num_steps}). Use ddim(eta=1.0), whose last step has none, with two "
            'steps or more, or flow(noise="memoryless"); other noise reaches a part of the tilt.'
        )
    if adjoint not in _ADJOINTS:
        raise ValueError(f'`adjoint` must be "lean" or "basic"; got {adjoint!r}.')
    base = arguments.floating("base", base, "Pass the base model's theta.", what="parameters")
    if regression_steps is None:
        return base, horizon
    chosen = arguments.positive_int("regression_steps", regression_steps)
    if chosen > horizon:
        raise ValueError(
            f"`regression_steps`={chosen} are more than the {horizon} steps of the sampler. Leave "
            "it out to match at all of them."
        )
    return base, chosen

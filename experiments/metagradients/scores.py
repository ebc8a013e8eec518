"""Four scores of training images: what a little more weight on each adds to the target losses."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import unrollgrad as ug
from experiments.metagradients.digit_training import (
    Examples,
    Params,
    Recipe,
    Run,
    cross_entropies,
    logits,
    trained,
    weighted_training,
)
from unrollgrad.running import need


def target_loss(recipe: Recipe, params: Params, target: Examples) -> jax.Array:
    """The mean cross-entropy of a target, which is some images."""
    return jnp.mean(cross_entropies(recipe, params, target))


def exact(recipe: Recipe, run: Run, weights: jax.Array, targets: Examples) -> jax.Array:
    """Metagradients: d loss of each target / d weight of each training image, (targets, images).

    Backpropagation through the whole training. Targets have leading axes (targets, images).
    """
    problem = weighted_training(recipe, run)

    def one(target):
        def evaluate(key, theta, state):
            return target_loss(recipe, state.params, target)

        estimator = ug.bptt(ug.final_loss(problem, evaluate), remat="step")
        key = jax.random.key(0)
        return estimator.estimate(key, weights, estimator.init(key, weights))[0].grad

    return jax.vmap(one)(targets)


def influence(
    recipe: Recipe, run: Run, weights: jax.Array, targets: Examples, damping: float | jax.Array
) -> jax.Array:
    """Influence functions at the trained net, with a damped Gauss-Newton matrix as curvature."""
    train, params = run.train, trained(recipe, run, weights)

    def inner(params, weights):
        return jnp.mean(weights * cross_entropies(recipe, params, train))

    def of_outputs(outputs, weights):
        shifted = jax.nn.log_softmax(outputs)
        rows = jnp.arange(len(shifted))
        return -jnp.mean(weights * shifted[rows, train.labels])

    curvature = ug.implicit.gauss_newton(
        lambda params, weights: logits(recipe, params, train.images), of_outputs
    )
    solver = need("lineax", "lineax").CG(rtol=1e-3, atol=1e-3, max_steps=CG_STEPS)

    def one(target):
        return ug.implicit.hypergradient(
            lambda params, weights: target_loss(recipe, params, target),
            inner,
            solver=solver,
            damping=damping,
            curvature=curvature,
        )(params, weights).grad

    return jax.vmap(one)(targets)


CG_STEPS = 50
"""The most steps of conjugate gradients for an influence function."""


def dots(
    recipe: Recipe, params: Params, train: Examples, targets: Examples
) -> tuple[jax.Array, jax.Array]:
    """Minus the dot products and the cosines of the gradients of training images and targets.

    The sum of the dot products over checkpoints is TracIn's score.
    """

    def gradient(target):
        slope: Any = jax.grad(lambda params: target_loss(recipe, params, target))(params)
        return ravel_pytree(slope)[0]

    single = jax.tree.map(lambda x: x[:, None], train)
    mine, theirs = jax.vmap(gradient)(targets), jax.vmap(gradient)(single)
    products = mine @ theirs.T
    sizes = jnp.linalg.norm(mine, axis=1)[:, None] * jnp.linalg.norm(theirs, axis=1)
    return -products, -products / jnp.maximum(sizes, jnp.finfo(sizes.dtype).tiny)

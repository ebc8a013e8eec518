"""A learned optimizer: theta is all weights of a network that computes every weight's update."""

import jax

import unrollgrad as ug
from experiments.problems.digits import mlp_on_digits
from unrollgrad.problems import Example


def learned_optimizer(
    horizon: int = 100, *, width: int = 16, hidden: int = 16, batch_size: int = 16
) -> Example:
    """A small MLP, whose weights are theta, trains another MLP on digits.

    The learned optimizer is ``ug.learned_optimizers.mlp`` with 8 features of a weight, one hidden
    layer and steps of 0.01 d exp(m / 10); theta has 178 weights. The published one is larger and
    slower: 19 features, two hidden layers of 32, steps of 0.001 d exp(m / 1000). The task is the
    task of ``digits``: every episode draws new weights and batches, and the step loss is the
    validation cross-entropy. The default theta is random with small outputs, so that the optimizer
    makes tiny steps.

    Args:
        horizon: Inner steps in an episode.
        width: Units in the hidden layer of the learned optimizer.
        hidden: Units in the hidden layer of the trained network.
        batch_size: Images in a training batch, and in a validation batch.

    Returns:
        ``Example(problem, theta)``; theta is a tree of the weights.

    References:
        See ``ug.learned_optimizers.mlp``.
    """
    rule = ug.learned_optimizers.mlp(
        decays=(0.5, 0.9, 0.99),
        times=(3.0, 30.0, 300.0),
        hidden=(width,),
        step=0.01,
        magnitude=0.1,
    )
    problem = ug.training_problem(
        **mlp_on_digits(hidden, batch_size),
        optimizer=lambda theta, t: rule.transform(theta),
        horizon=horizon,
    )
    return Example(problem, rule.init(jax.random.key(0)))

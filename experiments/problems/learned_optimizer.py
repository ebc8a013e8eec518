"""Training a learned optimizer: theta is all weights of a network that updates every weight."""

import jax

import unrollgrad as ug
from experiments.problems.digits import mlp_on_digits
from unrollgrad.problems import Example


def learned_optimizer(
    horizon: int = 100, *, width: int = 16, hidden: int = 16, batch_size: int = 16
) -> Example:
    """An MLP on digits is trained by another, small MLP; theta is the weights of that one.

    The learned optimizer is ``ug.learned_optimizers.mlp``, smaller and quicker than the published
    one (19 features, two hidden layers of 32, steps of 0.001 d exp(m / 1000)): 8 features of a
    weight, one hidden layer, steps of 0.01 d exp(m / 10); theta has 178 weights. The task is that
    of ``digits``: new weights and batches in every episode, and the step loss is the validation
    cross-entropy. The default theta is random with small outputs, so that the optimizer hardly
    moves anything.

    Args:
        horizon: Inner steps in an episode.
        width: Units in the hidden layer of the learned optimizer.
        hidden: Units in the hidden layer of the network that it trains.
        batch_size: Of training and of validation.

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

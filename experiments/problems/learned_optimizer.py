"""Training a learned optimizer: theta is all weights of a network that updates every weight."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import unrollgrad as ug
from experiments.problems.digits import MLP, mlp_on_digits
from unrollgrad.problems import Example

DECAYS = (0.5, 0.9, 0.99)
"""Of the averages of the gradient that the network sees."""

TIMES = (3.0, 30.0, 300.0)
"""Inner steps around which the network can tell early from late."""


def learned_optimizer(
    horizon: int = 100, *, width: int = 16, hidden: int = 16, batch_size: int = 16
) -> Example:
    """An MLP on digits is trained by another, small MLP; theta is the weights of that one.

    The learned optimizer looks at one weight at a time: its value, its gradient, three averages of
    past gradients, each divided by its root mean square over the tensor, and tanh(t / T - 1) for
    three times T. One hidden layer makes of these a direction d and a log magnitude m, and the
    weight moves by -0.01 d exp(m / 10). The task is that of ``digits``: new weights and batches in
    every episode, and the step loss is the validation cross-entropy.

    This is the design of Metz et al. and of LOLv2 (19 features, two hidden layers of 32, steps of
    0.001 d exp(m / 1000)), made smaller and quicker: theta has 178 weights. The default ones are
    random with small outputs, so that the optimizer hardly moves anything.

    Measured here: J is 2.41 at the default theta, where nothing is learned (a guess has ln 10 =
    2.30). After 600 steps of Adam(0.01) with 16 workers, truncation 20 and sigma 0.03 it is 0.50 on
    ``es_single`` and 0.53 on ``pes``; after 100 on ``bptt`` with 4 workers 0.54. As inner
    optimizers, Adam has 0.70 at its best rate, 0.04, and SGD with momentum 0.9 has 0.82 at 0.1. At
    the default theta every step matters to all later ones: the mean gradient of ``tbptt`` is 2, 11
    and 51 % as long as that of J, with truncations of 1, 10 and 50. Smoothing is off by 6 % of the
    gradient's norm with sigma 0.01, by 64 % with 0.03.

    Args:
        horizon: Inner steps in an episode.
        width: Units in the hidden layer of the learned optimizer.
        hidden: Units in the hidden layer of the network that it trains.
        batch_size: Of training and of validation.

    Returns:
        ``Example(problem, theta)``; theta is a dict of the weights.

    References:
        Metz et al., Understanding and correcting pathologies in the training of learned optimizers,
        ICML 2019, arXiv:1810.10180. LOLv2: ``MLPLOpt`` of google/learned_optimization.
    """
    network = MLP(2 + len(DECAYS) + len(TIMES), width, 2, rngs=nnx.Rngs(0))
    graph = nnx.graphdef(network)
    problem = ug.training_problem(
        **mlp_on_digits(hidden, batch_size),
        optimizer=lambda theta, t: transform(nnx.merge(graph, theta), t),
        horizon=horizon,
    )
    theta = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    theta["out"]["kernel"] *= 0.1
    return Example(problem, theta)


def transform(rule: MLP, t: jax.Array) -> optax.GradientTransformation:
    """The learned optimizer as optax has it, at inner step ``t``.

    Args:
        rule: From features (..., 8) to a direction and a log magnitude (..., 2).
        t: A scalar.
    """

    def init(params):
        return jax.tree.map(lambda w: jnp.zeros((*w.shape, len(DECAYS)), w.dtype), params)

    def update(updates, state, params=None):
        def average(m, g):
            decays = jnp.asarray(DECAYS, g.dtype)
            return decays * m + (1 - decays) * g[..., None]

        def move(w, m, g):
            own = jnp.concatenate([w[..., None], g[..., None], m], axis=-1)
            mean_square = jnp.mean(own**2, axis=tuple(range(w.ndim)), keepdims=True)
            own = own * jax.lax.rsqrt(mean_square + 1e-5)  # finite slopes where all are 0
            time = jnp.tanh(t / jnp.asarray(TIMES, w.dtype) - 1)
            time = jnp.broadcast_to(time, (*w.shape, len(TIMES)))
            out = rule(jnp.concatenate([own, time], axis=-1))
            return -0.01 * out[..., 0] * jnp.exp(out[..., 1] / 10)

        state = jax.tree.map(average, state, updates)
        return jax.tree.map(move, params, state, updates), state

    return optax.GradientTransformation(init, update)

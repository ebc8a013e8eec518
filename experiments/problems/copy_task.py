"""The copy task: an LSTM must remember symbols, then repeat them. Theta is all its weights."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import unrollgrad as ug
from experiments.problems.text_lstm import LSTM, zero_carry
from unrollgrad.problems import Example


def copy_task(
    horizon: int = 16, *, symbols: int = 2, embed: int = 4, hidden: int = 8, batch_size: int = 32
) -> Example:
    """An LSTM sees random symbols, then a delimiter until the end, while it must repeat them.

    There are L = horizon // 2 symbols. The symbol of step i must be repeated at step i + lag,
    lag = horizon - L: right after the last symbol, or one step later if the horizon is odd. The
    step loss is the cross-entropy of that symbol in nats, and 0 while symbols are shown. An episode
    draws a batch of sequences, which are kept in the inner state beside the LSTM's memory. theta
    has 446 weights.

    Known: a uniform guess has J = (L / horizon) ln(symbols), 0.347 by default, and perfect memory
    has J = 0. A truncation that divides the horizon is at most the lag, so that no window contains
    both a symbol and its repetition: ``tbptt`` gives the symbols' embeddings a gradient of exactly
    0, and learns only to read what the other weights happen to remember.

    Measured: J is 0.347 at the default theta, like a uniform guess. There the bias of ``tbptt`` is
    17, 12 and 10 % of the gradient's norm with truncations of 2, 4 and 8 (66 % with horizon 8 and
    truncation 4), and the bias of smoothing is 3 % with sigma 0.05 and 11 % with 0.1. After 1000
    steps of Adam(0.01) with 4 workers, J is 0.058 with ``bptt`` and 0.27 with ``tbptt``; after 400
    steps with horizon 8, J is 0.0007 and 0.14.

    Args:
        horizon: Inner steps in an episode, at least 2.
        symbols: Number of different symbols.
        embed: Size of the embedding.
        hidden: Units of the LSTM.
        batch_size: Number of sequences; the loss is their mean.

    Returns:
        ``Example(problem, theta)``; theta is a dict of the weights.

    Raises:
        ValueError: If the horizon leaves no room for a symbol.

    References:
        Mujika, Meier and Steger, Approximating real-time recurrent learning with random Kronecker
        factors, NeurIPS 2018 (the task with a growing length). Vicol, Kolter and Swersky, ICML
        2023, arXiv:2304.11153 (with ES-Single, 100 units).
    """
    length = horizon // 2
    lag = horizon - length
    if length < 1:
        raise ValueError(
            f"`horizon` must be at least 2, a step to see and a step to repeat; got {horizon}."
        )
    model = LSTM(symbols + 1, embed, hidden, symbols, rngs=nnx.Rngs(0))
    graph = nnx.graphdef(model)

    def init(key, theta):
        sequence = jax.random.randint(key, (length, batch_size), 0, symbols)
        return sequence, zero_carry(theta, batch_size, hidden)

    def step(key, theta, state, t):
        sequence, carry = state
        delimiter = symbols
        seen = jnp.where(t < length, sequence[jnp.minimum(t, length - 1)], delimiter)
        carry, logits = nnx.merge(graph, theta)(carry, seen)
        wanted = sequence[jnp.maximum(t - lag, 0)]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()
        return (sequence, carry), jnp.where(t < lag, 0.0, loss)

    theta = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return Example(ug.UnrolledProblem(init, step, horizon), theta)

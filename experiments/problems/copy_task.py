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

    With L = horizon // 2 symbols, the one of step i is wanted at step i + lag, lag = horizon - L:
    at once after the last symbol, or with an odd horizon one step later. The step loss is the
    cross-entropy of the wanted symbol in nats, 0 while symbols are shown. An episode draws a batch
    of sequences; they are in the inner state, with the LSTM's memory. theta has 446 weights.

    Known: a guess has J = (L / horizon) ln(symbols), 0.347 by default, and perfect memory 0. A
    truncation that divides the horizon is at most the lag, so that no window has both a symbol and
    its repetition: ``tbptt`` gives the embeddings of the symbols a gradient of exactly 0, and
    learns only to read what the other weights happen to remember.

    Measured here: J is 0.347 at the default theta, near a guess. There ``tbptt`` is off by 17, 12
    and 10 % of the gradient's norm with truncations of 2, 4 and 8 (by 66 % with horizon 8 and
    truncation 4), and smoothing by 3 % with sigma 0.05, by 11 % with 0.1. After 1000 steps of
    Adam(0.01) with 4 workers J is 0.058 on ``bptt`` and 0.27 on ``tbptt``; after 400 with horizon
    8, 0.0007 and 0.14.

    Args:
        horizon: Inner steps in an episode, at least 2.
        symbols: How many different ones there are.
        embed: Size of the embedding.
        hidden: Units of the LSTM.
        batch_size: Sequences; the loss is their mean.

    Returns:
        ``Example(problem, theta)``; theta is a dict of the weights.

    Raises:
        ValueError: If the horizon leaves no room for a symbol.

    References:
        Mujika, Meier and Steger, Approximating real-time recurrent learning with random Kronecker
        factors, NeurIPS 2018 (the task, with a length that grows). Vicol, Kolter and Swersky, ICML
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

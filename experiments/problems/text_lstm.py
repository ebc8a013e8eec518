"""A character-level language model: theta is all weights of an LSTM.

The text is the Python standard library's own source; nothing is downloaded.
"""

import argparse
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import unrollgrad as ug
from unrollgrad.problems import Example
from unrollgrad.types import Theta

VOCABULARY = 97
"""Number of symbols: printable ASCII, the end of a line, and one for all other characters."""


class LSTM(nnx.Module):
    """A map from symbols to logits: an embedding, one LSTM layer, a linear layer."""

    def __init__(self, symbols: int, embed: int, hidden: int, outputs: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(symbols, embed, rngs=rngs)
        self.cell = nnx.OptimizedLSTMCell(embed, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, outputs, rngs=rngs)

    def __call__(self, carry, symbols):
        """The next carry, and the logits of a batch."""
        # self.embed(symbols) would compute in float32 whatever theta's dtype is.
        carry, hidden = self.cell(carry, self.embed.embedding[symbols])
        return carry, self.out(hidden)


def zero_carry(theta: Theta, batch: int, hidden: int) -> tuple[jax.Array, jax.Array]:
    """The LSTM's memory at the start, in theta's dtype."""
    zeros = jnp.zeros((batch, hidden), jnp.result_type(*jax.tree.leaves(theta)))
    return zeros, zeros


def text_lstm(
    horizon: int = 100,
    *,
    text: str | None = None,
    embed: int = 5,
    hidden: int = 5,
    streams: int = 4,
) -> Example:
    """An LSTM reads text; the step loss is the cross-entropy of the next character, in nats.

    An episode begins at random places of the text. The inner state holds these places and the
    LSTM's memory; theta has 1287 weights. The sizes 5 and 5 come from the variance measurement of
    PES, which uses the Penn Treebank, one stream, horizon 1000 and sigma 0.001.

    Measured with argparse of Python 3.11 (99,661 characters): its entropy per character is 2.94
    nats, and 2.04 given the previous character. J is 4.52 at the default theta (a uniform guess has
    ln 97 = 4.57), 2.26 after 400 and 2.08 after 1000 steps of Adam(0.01) with ``bptt`` and 8
    workers, and 2.63 after 2000 steps with ``pes``, truncation 10, sigma 0.1 and 64 workers. At the
    default theta the bias of ``tbptt`` is 25, 6 and 2 % of the gradient's norm with truncations of
    1, 10 and 50, and the bias of smoothing is 2 % with sigma 0.1 and 14 % with 0.3.

    Args:
        horizon: Inner steps in an episode.
        text: The text. Default: the source of the standard library's ``argparse``.
        embed: Size of the embedding.
        hidden: Units of the LSTM.
        streams: Places that are read at the same time, each with its own memory; the loss is their
            mean.

    Returns:
        ``Example(problem, theta)``; theta is a dict of the weights.

    Raises:
        ValueError: If the text has fewer than 2 characters.

    References:
        Vicol et al., ICML 2021, arXiv:2112.13835 (the measurement).
    """
    text = inspect.getsource(argparse) if text is None else text
    if len(text) < 2:
        raise ValueError(f"`text` must have at least 2 characters; got {text!r}. Pass more.")
    symbols = jnp.asarray(encode(text))
    model = LSTM(VOCABULARY, embed, hidden, VOCABULARY, rngs=nnx.Rngs(0))
    graph = nnx.graphdef(model)

    def init(key, theta):
        places = jax.random.randint(key, (streams,), 0, len(text))
        return places, zero_carry(theta, streams, hidden)

    def step(key, theta, state, t):
        places, carry = state
        following = (places + 1) % len(text)
        carry, logits = nnx.merge(graph, theta)(carry, symbols[places])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, symbols[following])
        return (following, carry), losses.mean()

    theta = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return Example(ug.UnrolledProblem(init, step, horizon), theta)


def encode(text: str) -> np.ndarray:
    """Encodes each character as an int32 below ``VOCABULARY``."""
    codes = np.array([ord(character) for character in text], np.int32)
    printable = (codes >= 32) & (codes < 127)
    return np.where(printable, codes - 32, np.where(codes == ord("\n"), 95, 96))

"""Architectures with a small MLP that every weight of every tensor goes through."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from unrollgrad.learned_optimizers import features, networks
from unrollgrad.learned_optimizers.architecture import Architecture
from unrollgrad.learned_optimizers.per_weight import (
    Controller,
    Memory,
    averaging,
    check_hidden,
    transform_of,
)

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
"""Of the averages of the gradient."""

TIMES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 30_000.0, 100_000.0)
"""Steps around which early can be told from late."""


def mlp(
    *,
    decays: Sequence[float] = DECAYS,
    times: Sequence[float] = TIMES,
    hidden: Sequence[int] = (32, 32),
    step: float = 1e-3,
    magnitude: float = 1e-3,
) -> Architecture:
    """A per-parameter MLP, the design of Metz et al. and of LOLv2; the defaults are LOLv2's.

    A weight's features: its gradient, its value, averages of the gradient, each divided by its root
    mean square over the tensor; and tanh(t / T - 1) for several T. So neither the loss's scale nor
    the tensor's matters, between root mean squares of 1e-5 and 1e19.

    Theta has (2 + len(decays) + len(times) + 1) * hidden[0] + ... + 2 numbers; it begins random
    with small outputs, as an optimizer that hardly moves anything. Time per step: that of the
    MLP on all weights, about 2 * (features * hidden[0] + ...) operations for each; memory:
    len(decays) copies of the weights in the state, (features + hidden) during a step, in one array
    of all weights' rows: weights that are sharded are gathered for it.

    Args:
        decays: Of the averages.
        times: The T.
        hidden: Units of the hidden layers, at least one layer.
        step: Size of a step whose direction is 1 and log magnitude 0.
        magnitude: What the second output is multiplied by.

    Returns:
        An ``Architecture``; ``update`` needs ``params``.

    Raises:
        ValueError: Without a hidden layer.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> small = ug.learned_optimizers.mlp(hidden=(8,))
        >>> optimizer = small.transform(jax.jit(small.init)(jax.random.key(0)))
        >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
        >>> updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        >>> updates["w"].shape, int(state.count)
        ((2, 3), 1)

    References:
        Metz et al., Understanding and correcting pathologies in the training of learned optimizers,
        ICML 2019, arXiv:1810.10180. LOLv2: ``MLPLOpt`` of google/learned_optimization.
    """
    check_hidden(hidden)
    seen = 2 + len(decays)

    def init(key: Any) -> Any:
        return {"layers": networks.init_layers(key, (seen + len(times), *hidden, 2), last=0.1)}

    return Architecture(init, transform_of(averaging(decays), None, times, step, magnitude))


def adafactor_mlp(
    *,
    decays: Sequence[float] = (0.9, 0.99, 0.999),
    times: Sequence[float] = TIMES,
    hidden: Sequence[int] = (32, 32),
    step: float = 1e-3,
    magnitude: float = 1e-3,
) -> Architecture:
    """A per-parameter MLP that sees Adam's and Adafactor's quantities too.

    To the features of ``mlp`` it adds, for each decay: the averaged gradient over the root of the
    averaged square (Adam's direction), gradient and averaged gradient over the root of the factored
    average of squares (Adafactor's), the reciprocal roots of the averages over rows and columns,
    and that of the average itself for the last decay.

    Memory: len(decays) + 1 copies of the weights and the rows and columns; otherwise as ``mlp``.

    Args:
        decays: Of the averages, of gradients and of squares.
        times: As in ``mlp``.
        hidden: As in ``mlp``.
        step: As in ``mlp``.
        magnitude: As in ``mlp``.

    Returns:
        An ``Architecture``; ``update`` needs ``params``.

    Raises:
        ValueError: Without a hidden layer.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> small = ug.learned_optimizers.adafactor_mlp(hidden=(8,))
        >>> optimizer = small.transform(jax.jit(small.init)(jax.random.key(0)))
        >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
        >>> updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        >>> updates["w"].shape, int(state.count)
        ((2, 3), 1)

    References:
        Metz et al., Practical tradeoffs between memory, compute, and performance in learned
        optimizers, CoLLAs 2022, arXiv:2203.11860 (``adafac_mlp_lopt``).
    """
    check_hidden(hidden)
    seen = 3 + 6 * len(decays)

    def init(key: Any) -> Any:
        return {"layers": networks.init_layers(key, (seen + len(times), *hidden, 2), last=0.1)}

    def begin(zeros: jax.Array) -> Any:
        return {
            "mean": jnp.stack([zeros] * len(decays), axis=-1),
            "square": zeros[..., None],
            "factored": features.factored_zeros(zeros.shape, len(decays), zeros.dtype),
        }

    def see(old: Any, g: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
        new = {
            "mean": features.averages(old["mean"], g, decays),
            "square": features.averages(old["square"], g**2, decays[-1:]),
            "factored": features.factored_averages(old["factored"], g, decays),
        }
        mean, root = new["mean"], jax.lax.rsqrt(new["square"] + features.TINY)
        both, rows, columns = features.factored_rsqrt(new["factored"], g.shape)
        plain = jnp.stack([g, w], axis=-1)
        found = [plain, root, mean, mean * root, plain[..., :1] * both, mean * both, rows, columns]
        return jnp.concatenate(found, axis=-1), new

    memory = Memory(begin, see)
    return Architecture(init, transform_of(memory, None, times, step, magnitude))


def rnn_mlp(
    *,
    decays: Sequence[float] = DECAYS,
    times: Sequence[float] = TIMES,
    hidden: Sequence[int] = (16, 16),
    units: int = 16,
    step: float = 1e-3,
    magnitude: float = 1e-3,
) -> Architecture:
    """``mlp`` with a recurrent network for each tensor that controls it.

    A gated recurrent unit, the same for all tensors, reads in every step of each tensor the log
    root mean squares of gradient, weights and averages, the log of its size, its number of axes and
    the time. What it remembers says what is added to the first layer of the per-parameter MLP for
    this tensor, and a log magnitude for all its weights.

    Time: that of ``mlp``, and the recurrent network once for each tensor. Memory: that of ``mlp``.

    Args:
        decays: As in ``mlp``.
        times: As in ``mlp``.
        hidden: As in ``mlp``.
        units: Of the recurrent network.
        step: As in ``mlp``.
        magnitude: As in ``mlp``, for both log magnitudes.

    Returns:
        An ``Architecture``; ``update`` needs ``params``.

    Raises:
        ValueError: Without a hidden layer.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> small = ug.learned_optimizers.rnn_mlp(hidden=(8,), units=4)
        >>> optimizer = small.transform(jax.jit(small.init)(jax.random.key(0)))
        >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
        >>> updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        >>> state.controller.shape, int(state.count)
        ((2, 4), 1)

    References:
        Wichrowska et al., Learned optimizers that scale and generalize, ICML 2017,
        arXiv:1703.04813; Metz et al., VeLO, 2022, arXiv:2211.09760 (a recurrent network for each
        tensor, which there chooses the weights of the per-parameter MLP).
    """
    plain = mlp(decays=decays, times=times, hidden=hidden, step=step, magnitude=magnitude)
    read = 2 + len(decays) + 2 + len(times)

    def init(key: Any) -> Any:
        keys = jax.random.split(key, 3)
        gru = networks.init_gru(keys[1], read, units)
        control = networks.init_layers(keys[2], (units, hidden[0] + 1), last=0.1)
        return {**plain.init(keys[0]), "gru": gru, "control": control}

    def begin(count: int) -> jax.Array:
        return jnp.zeros((count, units), jnp.float32)

    def control(theta: Any, memory: Any, tensors: jax.Array) -> tuple[Any, Any, Any]:
        memory = networks.apply_gru(theta["gru"], tensors, memory)
        out = networks.apply_layers(theta["control"], memory)
        return memory, out[:, :-1], out[:, -1]

    controller = Controller(begin, control)
    return Architecture(init, transform_of(averaging(decays), controller, times, step, magnitude))

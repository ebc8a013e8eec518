"""Architectures that apply one small MLP to every weight of every tensor."""

from collections.abc import Sequence

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

__all__ = ["DECAYS", "TIMES", "adafactor_mlp", "mlp", "rnn_mlp"]

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
"""Decays of the averages of the gradient."""

TIMES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 30_000.0, 100_000.0)
"""Numbers of steps around which the network can tell early from late."""


def mlp(
    *,
    decays: Sequence[float] = DECAYS,
    times: Sequence[float] = TIMES,
    hidden: Sequence[int] = (32, 32),
    step: float = 1e-3,
    magnitude: float = 1e-3,
) -> Architecture:
    """A per-parameter MLP, the design of Metz et al. and of LOLv2; the defaults are LOLv2's.

    A weight's features are its gradient, its value and averages of the gradient, each divided by
    its root mean square over the tensor, and tanh(t / T - 1) for several T. The scale of the loss
    and of the tensor does not matter between root mean squares of 1e-5 and 1e19.

    Theta has (2 + len(decays) + len(times) + 1) * hidden[0] + ... + 2 numbers; it begins random
    with small outputs, as an optimizer that hardly moves the weights. Time per step: the MLP on all
    weights, about 2 * (features * hidden[0] + ...) operations for each weight. Memory: len(decays)
    copies of the weights in the state, and (features + hidden) per weight during a step, in one
    array of all weights' rows: sharded weights are gathered for it.

    Args:
        decays: Decays of the averages.
        times: The T.
        hidden: Units of the hidden layers, at least one layer.
        step: Size of a step whose direction is 1 and log magnitude 0.
        magnitude: Factor of the second output, the log magnitude.

    Returns:
        An ``Architecture``; ``update`` needs ``params``.

    Raises:
        ValueError: If there is no hidden layer.

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
    sizes = (2 + len(decays) + len(times), *hidden, 2)

    def init(key):
        return {"layers": networks.init_layers(key, sizes, last=0.1)}

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
    average of squares (Adafactor's), and the reciprocal roots of the averages over rows and
    columns; and, for the last decay, the reciprocal root of the averaged square.

    Arguments, result and errors are as for ``mlp``; ``decays`` apply to the averages of gradients
    and of squares. Memory: len(decays) + 1 copies of the weights and the rows and columns;
    otherwise as ``mlp``.

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
    sizes = (3 + 6 * len(decays) + len(times), *hidden, 2)

    def init(key):
        return {"layers": networks.init_layers(key, sizes, last=0.1)}

    def begin(zeros):
        return {
            "mean": jnp.stack([zeros] * len(decays), axis=-1),
            "square": zeros[..., None],
            "factored": features.factored_zeros(zeros.shape, len(decays), zeros.dtype),
        }

    def see(old, g, w):
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
    """``mlp`` with a recurrent network that controls it for each tensor.

    A gated recurrent unit, the same for all tensors, reads in every step of each tensor the log
    root mean squares of gradient, weights and averages, the log of its size, its number of axes and
    the time. From its memory it computes, for this tensor, a term for the first layer of the
    per-parameter MLP and a log magnitude for all weights.

    Arguments, result and errors are as for ``mlp``; ``units`` is the size of the recurrent network,
    and ``magnitude`` multiplies both log magnitudes. Time and memory: as ``mlp``, plus the
    recurrent network once for each tensor.

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
        tensor, which in VeLO chooses the weights of the per-parameter MLP).
    """
    plain = mlp(decays=decays, times=times, hidden=hidden, step=step, magnitude=magnitude)
    read = 2 + len(decays) + 2 + len(times)

    def init(key):
        keys = jax.random.split(key, 3)
        gru = networks.init_gru(keys[1], read, units)
        control = networks.init_layers(keys[2], (units, hidden[0] + 1), last=0.1)
        return {**plain.init(keys[0]), "gru": gru, "control": control}

    def begin(count):
        return jnp.zeros((count, units), jnp.float32)

    def control(theta, memory, tensors):
        memory = networks.apply_gru(theta["gru"], tensors, memory)
        out = networks.apply_layers(theta["control"], memory)
        return memory, out[:, :-1], out[:, -1]

    controller = Controller(begin, control)
    return Architecture(init, transform_of(averaging(decays), controller, times, step, magnitude))

"""``replay``: what ``bptt`` computes, for episodes of any length, dispatch by dispatch."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, influence, inner_loop
from unrollgrad._core import unroll
from unrollgrad._core.contexts import own_transfers
from unrollgrad._core.progress import progress_bar
from unrollgrad._replay import schedule, storage
from unrollgrad._replay.programs import Programs, Pulled, programs
from unrollgrad.estimators._window import estimate_of
from unrollgrad.estimators.backprop import no_while_loop
from unrollgrad.types import Estimate, Key, State, Theta, UnrolledProblem

_BACKWARD = 2  # a step backwards takes about as long as so many forwards


def replay(
    problem: UnrolledProblem,
    key: Key,
    theta: Theta,
    *,
    arity: int = 2,
    folder: str | Path | None = None,
    steps_per_dispatch: int = 100,
) -> Estimate:
    """The exact gradient of one long episode, a metagradient, by a tree of checkpoints.

    It is what ``bptt(problem).estimate(key, theta, ...)`` computes, for episodes of any length:
    ``grad`` = d/dtheta [(1/T) sum_t loss_t + evaluate(final state)], through ``init`` too. Theta
    may be hyperparameters, initial weights, weights of examples. Where ``bptt`` is one program,
    this is a loop of short ones: it shows its progress and the remaining time, and with a
    ``folder`` **the same call goes on** after it was interrupted or killed, and ends with the same
    bits on the same devices.

    Memory: at most k ceil(log_k(T)) + 2 states at once, k the ``arity``, and what one step
    computes. They are on the devices, if half of the free memory holds them, else on the host, or
    in the ``folder``.

    Time: T steps backwards, and T (1 + d + D (1 - 1/k)) forwards, if T = k^(D + d) and a dispatch
    runs k^d steps; otherwise at most
    T (1 + ceil(log_k(T))), and T more if k is above ``steps_per_dispatch``. (A node of the tree
    runs from its beginning to its last branch; the D levels of nodes above the dispatches therefore
    run a share of 1 - 1/k again, the d levels inside of them everything.) A larger arity takes less
    time and more memory: for T = 4096 arity 2 runs 10 T steps with 20 states, arity 16 3.9 T with
    48, arity 64 3 T with 129. ``info.inner_steps`` is the number of forward steps.

    With several processes every process makes the same call, with a state that is spread over a
    mesh of all devices from ``init`` on.

    Args:
        problem: The inner loop; its horizon must be static and its step differentiable.
        key: The episode's key; ``bptt`` and ``episode_loss`` run the same episode.
        theta: Outer parameters.
        arity: The branches of the tree, at least 2.
        folder: A folder for the states, at most as many as above, and for what has been pulled
            back. It belongs to this computation; afterwards it holds the result. A run that is
            killed loses at most half a minute, or one dispatch.
        steps_per_dispatch: The most inner steps in one program. With a ``folder``, what has been
            pulled back is written after each (about one state and one theta), in the background.

    Raises:
        ValueError: If the horizon is sampled, ``arity`` is below 2, the step contains a
            ``while_loop``, or the folder holds another computation.
        TypeError: If an argument has the wrong type, or is traced: it does not run inside ``jit``.
        OSError: If a file cannot be written or read.
        RuntimeError: If another process uses the folder.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimate = ug.replay(problem, jax.random.key(0), theta, steps_per_dispatch=10)
        >>> round(float(estimate.grad), 2)
        35.72

    References:
        Engstrom et al., Optimizing ML training with metagradient descent, 2025, arXiv:2503.13751.
    """
    horizon = inner_loop.static_horizon(problem, "replay")
    arity = arguments.positive_int("arity", arity)
    if arity < 2:
        raise ValueError(f"`arity` must be at least 2; got {arity}. A tree needs branches.")
    most = arguments.positive_int("steps_per_dispatch", steps_per_dispatch)
    _check_not_traced(key, theta)
    if folder is not None and not str(folder):
        raise ValueError("`folder` must name a folder; got an empty name. None: no files.")
    tree = schedule.tree(horizon, arity, most)
    with own_transfers():
        key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
        influence.check_theta(theta, *inner_loop.check_step(problem, key, theta))
        episode = unroll.new_episode(horizon, key, horizon)
        with no_while_loop("replay"):
            run = programs(problem, episode, theta, tree)
        with _storages(run, tree, folder) as (states, pulled):
            grad, loss = run.end(_replayed(run, tree, states, pulled))
    return estimate_of(grad, loss, schedule.forward_steps(tree))


@contextlib.contextmanager
def _storages(
    run: Programs, tree: schedule.Tree, folder: str | Path | None
) -> Iterator[tuple[storage.Storage, storage.Storage]]:
    """Where the states are kept, and where what has been pulled back is."""
    number = schedule.num_states(tree)
    if folder is None:
        yield storage.in_memory(run.state, number), storage.nowhere()
        return
    about = {"programs, theta, key": run.digest(), "tree": list(tree), **storage.processes()}
    with storage.opened(folder, about) as (place, queue):
        states = storage.on_disk(place, "state", run.state, queue)
        yield states, storage.on_disk(place, "pulled", run.pulled, queue)


def _replayed(
    run: Programs, tree: schedule.Tree, states: storage.Storage, pulled: storage.Storage
) -> Pulled:
    """Pulls the leaves back, beginning with the last one that has not been."""
    left = min(pulled.places(), default=tree.num_leaves)
    total = pulled.find(left) if left < tree.num_leaves else run.pulled
    forward = schedule.forward_steps(tree, left, frozenset(states.places()))
    work = forward + _BACKWARD * min(left * tree.leaf_steps, tree.num_steps)
    with progress_bar(work, "steps") as progress:
        done = 0

        def report(text: str, forward: int, backward: int = 0) -> None:
            nonlocal done
            done += forward + _BACKWARD * backward
            progress(text, done)

        for leaf in reversed(range(left)):
            state = _first_state(run, tree, states, leaf, report)
            total = run.pull(total, leaf, state)
            jax.block_until_ready(total)
            steps = tree.steps_of(leaf)
            pulled.keep(leaf, total)
            _forget(states, leaf, tree.num_leaves)
            # The one before stays: another process may be killed before it has written this one.
            _forget(pulled, leaf + 2, tree.num_leaves)
            report("backward", schedule.passes(steps, tree.arity) * steps, steps)
    return total


def _first_state(
    run: Programs,
    tree: schedule.Tree,
    states: storage.Storage,
    leaf: int,
    report: Callable[[str, int], None],
) -> State:
    """The first state of a leaf, in buffers of its own; those on the way to it are stored.

    The first state of the episode is not: ``run`` holds it.
    """
    origin, stops = schedule.moves(tree, leaf, states.places())
    state = states.find(origin) if origin else jax.tree.map(jnp.copy, run.state)
    at = origin
    for stop in stops:
        while at < stop:
            state = jax.block_until_ready(run.advance(state, at))
            at += 1
            if at < stop:
                states.note(at, state)
            elif stop < leaf:
                states.keep(stop, state)
            report("forward", tree.leaf_steps)
        _forget(states, origin + 1, stop)
        origin = stop
    return state


def _forget(stored: storage.Storage, first: int, end: int) -> None:
    """Drops what is stored at these places, the end not included."""
    for place in stored.places():
        if first <= place < end:
            stored.drop(place)


def _check_not_traced(*given: object) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(given)):
        raise TypeError(
            "`replay` is a loop of compiled programs, which cannot run inside jit, vmap or grad; "
            "got a traced `key` or `theta`. Call it in a Python loop, or use "
            '`bptt(problem, remat="log")`, the same tree in one program.'
        )

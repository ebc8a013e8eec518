"""The compiled programs: begin, run a leaf forwards, pull a leaf back, and end.

They are compiled once: the place in the episode is an argument. A program that is equal to one of
an earlier call is not compiled again.
"""

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from unrollgrad._core import eager, unroll
from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad._core.float_leaves import floats_of, split
from unrollgrad._replay.schedule import Tree
from unrollgrad._workers.mesh import placed
from unrollgrad.types import Episode, Segment, State, Theta, UnrolledProblem


class Pulled(NamedTuple):
    """What has been pulled back from the end of the episode to a state in it.

    Attributes:
        slope: The derivative of J's part after the state, by the state's floating leaves.
        grad: The derivative of that part by theta, with the state held constant; at least float32.
        loss: That part of J.
    """

    slope: list[jax.Array]
    grad: Any
    loss: jax.Array


class Programs(NamedTuple):
    """The programs of one episode.

    Attributes:
        state: The state at the beginning of the episode.
        pulled: What has been pulled back at its end, zeros.
        advance: ``advance(state, leaf) -> state`` runs a leaf; it takes the state's buffers over.
        pull: ``pull(pulled, leaf, state) -> pulled`` pulls a leaf back, whose first state is given;
            it takes the buffers of ``pulled`` over.
        end: ``end(pulled) -> (grad, loss)`` goes back through ``init``.
        digest: A text that is equal for equal programs, theta and key, also in other processes.
    """

    state: State
    pulled: Pulled
    advance: Callable[[State, int], State]
    pull: Callable[[Pulled, int, State], Pulled]
    end: Callable[[Pulled], tuple[Theta, jax.Array]]
    digest: Callable[[], str]


def programs(problem: UnrolledProblem, episode: Episode, theta: Theta, tree: Tree) -> Programs:
    """Traces the programs, and begins the episode."""
    begin = eager.fixed(functools.partial(_begin, problem), None, episode, theta)
    state, pulled = begin(None, episode, theta)
    where, (pulled, theta, episode) = _on_its_mesh(state, pulled, theta, episode)
    forward = functools.partial(_advance, problem, tree.leaf_steps, where[0])
    advance = eager.fixed(forward, state, episode, theta)
    back = {}
    for steps in {tree.steps_of(0), tree.steps_of(tree.num_leaves - 1)}:
        part = _Part(problem, steps, tree, where[1])
        back[steps] = eager.fixed(functools.partial(_pull, part), pulled, episode, theta, state)
    end = eager.fixed(functools.partial(_end, problem), None, pulled, episode, theta)

    def at(leaf: int) -> Episode:
        return episode._replace(t=np.int32(leaf * tree.leaf_steps))

    def digest() -> str:
        traced = [begin, advance, *back.values(), end]
        arrays = jax.tree.leaves((episode, theta, [p.constants for p in traced]))
        return _digest([part for p in traced for part in p.program.text], arrays)

    return Programs(
        state,
        pulled,
        advance=lambda state, leaf: advance(state, at(leaf), theta),
        pull=lambda pulled, leaf, state: back[tree.steps_of(leaf)](pulled, at(leaf), theta, state),
        end=lambda pulled: end(None, pulled, episode, theta),
        digest=digest,
    )


def _begin(problem, _, episode, theta):
    state = unroll.initial_state(problem, episode, theta)

    def losses(state):
        yield unroll.one_step(problem, episode.key, theta, state, episode.t, None)[1]
        if problem.evaluate is not None:
            yield unroll.evaluate(problem, episode, theta, state)

    dtypes = [x.dtype for x in jax.eval_shape(lambda state: list(losses(state)), state)]
    grad = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x)), theta)
    slope = [jnp.zeros_like(x) for x in floats_of(state)]
    return state, Pulled(slope, grad, jnp.zeros((), wide(*dtypes)))


def _advance(problem, steps, layouts, state, episode, theta):
    state, _ = unroll.unroll(Segment(problem, episode, steps), theta, state)
    return _laid_out(state, layouts)


class _Part(NamedTuple):
    """What one program pulls back: so many steps of the tree; its result has these layouts."""

    problem: UnrolledProblem
    steps: int
    tree: Tree
    layouts: list[Any] | None


def _pull(part, pulled, episode, theta, state):
    problem, steps, tree, layouts = part
    segment, horizon = Segment(problem, episode, steps), tree.num_steps
    remat = unroll.branches(steps, tree.arity)
    floats, rebuild = split(state)

    def run(theta, floats):
        after, losses = unroll.unroll(segment, theta, rebuild(floats), remat)
        return (jnp.sum(losses) / horizon, floats_of(after)), after

    (loss, _), back, after = jax.vjp(run, theta, floats, has_aux=True)
    if problem.evaluate is not None:
        last = episode.t + steps == horizon
        evaluated = functools.partial(_evaluated, problem, episode, theta, after)
        pulled = jax.lax.cond(last, evaluated, lambda pulled: pulled, pulled)
    grad, slope = back((jnp.ones_like(loss), pulled.slope))
    with standard_promotion():
        total = (pulled.loss + loss).astype(pulled.loss.dtype)
    return _laid_out(Pulled(slope, _plus(pulled.grad, grad), total), layouts)


def _evaluated(problem, episode, theta, state, pulled):
    """What is pulled back from the evaluation of the final state."""
    floats, rebuild = split(state)

    def run(theta, floats):
        return unroll.evaluate(problem, episode, theta, rebuild(floats))

    loss, back = jax.vjp(run, theta, floats)
    grad, slope = back(jnp.ones_like(loss))
    return Pulled(slope, _plus(pulled.grad, grad), loss.astype(pulled.loss.dtype))


def _end(problem, _, pulled, episode, theta):
    def run(theta):
        return floats_of(unroll.initial_state(problem, episode, theta))

    (grad,) = jax.vjp(run, theta)[1](pulled.slope)
    total = _plus(pulled.grad, grad)
    return jax.tree.map(lambda g, x: g.astype(x.dtype), total, theta), pulled.loss


def _plus(total, grad):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grad)


def _on_its_mesh(state, pulled, theta, episode):
    """The layouts of the state and of what is pulled back, and the other arrays placed likewise.

    A state that is spread over a mesh stays as its first one is; theta is whole on every device of
    the mesh, unless it is spread over it too.
    """
    layouts = [x.sharding for x in jax.tree.leaves(state)]
    meshes = {x.mesh for x in layouts if isinstance(x, NamedSharding)}
    if not meshes:
        return (None, None), (pulled, theta, episode)
    whole = NamedSharding(meshes.pop(), PartitionSpec())
    theta, episode = jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else placed(x, whole), (theta, episode)
    )
    slope = list(map(_as, pulled.slope, floats_of(state)))
    grad = jax.tree.map(_as, pulled.grad, theta)
    pulled = Pulled(slope, grad, jax.tree.map(lambda x: placed(x, whole), pulled.loss))
    return (layouts, [x.sharding for x in jax.tree.leaves(pulled)]), (pulled, theta, episode)


def _as(x: jax.Array, other: jax.Array) -> Any:
    """The array with the layout of another one."""
    return placed(x, other.sharding) if isinstance(other.sharding, NamedSharding) else x


def _laid_out(tree, layouts):
    """The tree with these layouts, so that the next call finds the program of this one."""
    if layouts is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    both = zip(leaves, layouts, strict=True)
    return structure.unflatten(jax.lax.with_sharding_constraint(x, s) for x, s in both)


def _digest(parts: list[object], arrays: list[jax.Array]) -> str:
    """A hash of programs, the constants inside of them, and arrays.

    Addresses differ between processes, and so does the order of the names in a set.
    """
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if not isinstance(part, bytes):
            text = re.sub(r"0x[0-9a-f]+", "", str(part))
            part = re.sub(r"\{([^{}:;=\n]*)\}", _in_order, text).encode()
        found.update(len(part).to_bytes(8, "little") + part)
    for x in arrays:
        found.update(eager.contents(x))
    return found.hexdigest()


def _in_order(names: re.Match[str]) -> str:
    """A set with its names in order."""
    return "{" + ", ".join(sorted(re.findall(r"[^\s,]+", names[1]))) + "}"

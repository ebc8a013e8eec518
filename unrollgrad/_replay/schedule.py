"""Which states the tree of checkpoints keeps, and which steps run again: numbers alone.

The episode's T steps are cut into leaves, the steps of one dispatch. A leaf is pulled back by one
program, in which its own steps are a tree again (``unroll.branches``). The leaves are the leaves of
a tree of the given arity above it: a node keeps the first state of each of its branches, works
through the branches from the last to the first, and forgets a branch's state with the branch.

States: on the way to a leaf a node keeps at most ``arity`` first states, and one of them is the
node's own, so that D levels of nodes keep at most 1 + (arity - 1) D states.

Forward steps: a node of m leaves runs from its own first leaf to the first leaf of its last branch,
m (1 - 1/arity) leaves; a level of nodes together L (1 - 1/arity) leaves, if L = arity^D. The
program of a leaf with d levels runs its steps 1 + d times: once for the states of each level, and
once more for what the backward step needs. All together T (1 + d + D (1 - 1/arity)) steps, fewer
than the T (1 + log_arity(T)) of a tree whose every level runs all of its steps again.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from unrollgrad._core import unroll


class Tree(NamedTuple):
    """The steps of an episode as a tree of checkpoints.

    Attributes:
        num_steps: The steps of the episode (T).
        arity: The branches of a node.
        leaf_steps: The steps of a leaf; the last leaf has the rest.
    """

    num_steps: int
    arity: int
    leaf_steps: int

    @property
    def num_leaves(self) -> int:
        """The number of leaves, L."""
        return -(-self.num_steps // self.leaf_steps)

    def steps_of(self, leaf: int) -> int:
        """The number of steps of a leaf."""
        return min(self.leaf_steps, self.num_steps - leaf * self.leaf_steps)


def tree(num_steps: int, arity: int, most: int) -> Tree:
    """A tree whose leaves have at most so many steps.

    If there are several leaves, their steps are the largest possible power of the arity, so that
    the levels inside of a leaf and those above it are the levels of one tree. If even a single node
    has too many branches for a leaf, a leaf has as many steps as it may.
    """
    if num_steps <= most:
        return Tree(num_steps, arity, num_steps)
    power = 1
    while power * arity <= most:
        power *= arity
    return Tree(num_steps, arity, power if power > 1 else most)


def path(tree: Tree, leaf: int) -> Iterator[int]:
    """The leaves, in order, whose first states are kept while ``leaf`` is pulled back; it is last.

    They are the first leaves of all branches, of the nodes above ``leaf``, up to its own.
    """
    first, size = 0, tree.num_leaves
    yield first
    while size > 1:
        branch = -(-size // tree.arity)
        number = (leaf - first) // branch
        yield from (first + branch * i for i in range(1, number + 1))
        first, size = first + branch * number, min(branch, size - branch * number)


def moves(tree: Tree, leaf: int, stored: Iterable[int]) -> tuple[int, list[int]]:
    """How to get the first state of ``leaf``, given the leaves whose first states are stored.

    Returns:
        The stored leaf to begin at, or 0 for the beginning of the episode, whose state is always
        there; and the leaves to run to, in order. The first states of all of them but ``leaf`` are
        to be stored on the way.
    """
    origin = max((place for place in stored if place <= leaf), default=0)
    return origin, [place for place in path(tree, leaf) if place > origin]


def passes(steps: int, arity: int) -> int:
    """How many times the program of a leaf runs its steps forwards: 1 + d."""
    return 1 + len(unroll.branches(steps, arity))


@functools.lru_cache(maxsize=16)
def forward_steps(tree: Tree, left: int | None = None, stored: frozenset[int] = frozenset()) -> int:
    """The forward steps that pull back the first ``left`` leaves, by default all of them.

    ``stored`` are the leaves whose first states are stored already.
    """
    total, kept = 0, set(stored)
    for leaf in reversed(range(tree.num_leaves if left is None else left)):
        origin, stops = moves(tree, leaf, kept)
        total += tree.leaf_steps * (leaf - origin)
        total += passes(tree.steps_of(leaf), tree.arity) * tree.steps_of(leaf)
        kept = {place for place in {*kept, *stops} if place < leaf}
    return total


def num_states(tree: Tree) -> int:
    """The most states that are alive at once, inside of the programs too, and a cotangent."""
    above = max(sum(1 for _ in path(tree, leaf)) for leaf in range(tree.num_leaves))
    return above + sum(unroll.branches(tree.leaf_steps, tree.arity)) + 1


def depth(tree: Tree) -> int:
    """ceil(log_arity(T)), the levels of a tree with single steps as its leaves."""
    return max(1, math.ceil(round(math.log(max(tree.num_steps, 2), tree.arity), 9)))

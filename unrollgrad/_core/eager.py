"""Functions that users call outside ``jit``, in a Python loop: compiled once, and nothing leaks.

``jax.jit`` would keep what a function closes over as it was in the first call: a loss that closes
over the batch of a loop would see the first batch for ever. So a function is traced in every call,
which reads its closure, and is compiled only if the program that comes out is a new one.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Out = TypeVar("Out")


class Program:
    """A traced function; two are equal if they print alike and hold equal constants.

    The rules of custom derivatives inside are not compared: a rule that closes over something else
    than in an earlier call, with the same function, is taken for the earlier one.

    Attributes:
        jaxpr: The program, whose constants are arguments: scalars are printed in it.
        text: The program as text, and the constants of the programs inside of it.
    """

    def __init__(self, jaxpr: Any):
        """Wraps the program of ``jax.make_jaxpr``."""
        self.jaxpr, self.text = jaxpr, (str(jaxpr), *_inner_constants(jaxpr))

    def __eq__(self, other: object) -> bool:
        """Whether the other program is the same."""
        return isinstance(other, Program) and self.text == other.text

    def __hash__(self) -> int:
        """As the text."""
        return hash(self.text)

    def __call__(self, constants: list[jax.Array], *leaves: jax.Array) -> list[jax.Array]:
        """The leaves of the function's result."""
        return jax.core.eval_jaxpr(self.jaxpr, constants, *leaves)


def _inner_constants(jaxpr: Any) -> Iterator[object]:
    """The constants that the programs inside a program hold themselves, as what can be compared."""
    for equation in jaxpr.eqns:
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                for x in getattr(inner, "consts", ()):
                    yield id(x) if isinstance(x, jax.core.Tracer) else contents(x)
                program = getattr(inner, "jaxpr", inner)
                if hasattr(program, "eqns"):
                    yield from _inner_constants(program)


def contents(x: Any) -> bytes:
    """The numbers of an array that this process holds, with their type and shape."""
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    whole = not isinstance(x, jax.Array) or x.is_fully_addressable
    parts = [x] if whole else [shard.data for shard in x.addressable_shards]
    form = f"{jnp.result_type(x)}{np.shape(x)}".encode()
    return b"".join([form, *(np.asarray(part).tobytes() for part in parts)])


@functools.lru_cache(maxsize=128)
def _first(program: Program) -> Program:
    return program


def traced(function: Callable[..., Out], *args: Any) -> tuple[Program, list[jax.Array], Out]:
    """The program of ``function(*args)``, the arrays that it closes over, and the result's shape.

    Of equal programs the first one is returned, so that what is compiled or cached for it is found.
    """
    closed: Any
    # A new function, since jax remembers the program of one that it has seen.
    closed, shape = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    jaxpr = getattr(closed, "jaxpr", closed)  # jax 0.12 has one class for both
    return _first(Program(jaxpr)), list(closed.consts), shape


@functools.partial(jax.jit, static_argnums=0)
def _run(program: Program, constants: list[jax.Array], leaves: list[jax.Array]) -> list[jax.Array]:
    return program(constants, *leaves)


def compiled(function: Callable[..., Out]) -> Callable[..., Out]:
    """The function of trees of arrays, compiled where it is called outside ``jit``."""

    @functools.wraps(function)
    def call(*args):
        leaves = jax.tree.leaves(args)
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return function(*args)
        program, constants, shape = traced(function, *args)
        return jax.tree.unflatten(jax.tree.structure(shape), _run(program, constants, leaves))

    return call


def known(function: Callable[..., Out], *args: Any) -> Out:
    """The function of numbers, computed now even inside ``jit``; tracers if it closes over them."""
    program, constants, shape = traced(function, *args)
    with jax.ensure_compile_time_eval():
        found = _run(program, constants, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _run_over(
    program: Program, constants: list[jax.Array], first: list[jax.Array], leaves: list[jax.Array]
) -> list[jax.Array]:
    return program(constants, *first, *leaves)


class Fixed(NamedTuple):
    """A traced function: it is called with arguments of the same form, without another trace.

    Attributes:
        program: The program.
        constants: The arrays that the function closed over.
        structure: The structure of the result.
    """

    program: Program
    constants: list[jax.Array]
    structure: Any

    def __call__(self, first: Any, *args: Any) -> Any:
        """The result; it takes the buffers of ``first`` over."""
        leaves = _run_over(
            self.program, self.constants, jax.tree.leaves(first), jax.tree.leaves(args)
        )
        return jax.tree.unflatten(self.structure, leaves)


def fixed(function: Callable[..., Any], *args: Any) -> Fixed:
    """The function as it is for arguments of the form of ``args``."""
    program, constants, shape = traced(function, *args)
    return Fixed(program, constants, jax.tree.structure(shape))

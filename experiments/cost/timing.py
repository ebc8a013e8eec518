"""Programs are timed in turn, since a machine changes its pace; memory is what XLA plans."""

import functools
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

Name = TypeVar("Name", bound=Hashable)


class Compiled(NamedTuple):
    """A program, ready to run.

    Attributes:
        call: Runs the program, without tracing.
        seconds: Seconds of tracing and compiling.
        mebibytes: The peak memory that XLA plans: arguments, results and temporaries; donated
            arguments count once.
        temporaries: The memory that XLA plans for temporaries, in bytes.
    """

    call: Callable[..., Any]
    seconds: float
    mebibytes: float
    temporaries: int


def compiled(
    function: Callable[..., object], *args: object, donate: tuple[int, ...] = ()
) -> Compiled:
    """Compiles a function for these arguments, without reuse of programs in memory."""
    begun = time.perf_counter()
    program = jax.jit(lambda *args: function(*args), donate_argnums=donate).lower(*args).compile()
    seconds = time.perf_counter() - begun
    plan: Any = program.memory_analysis()
    size = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    size -= plan.alias_size_in_bytes
    return Compiled(program, seconds, size / 2**20, plan.temp_size_in_bytes)


def compiled_in_turn(
    programs: Mapping[Name, tuple[Callable[..., object], tuple[object, ...]]], num_repeats: int
) -> dict[Name, Compiled]:
    """Compiles every (function, args), turn after turn; ``seconds`` are the medians.

    With a persistent compilation cache, ``seconds`` are the time of reading it.
    """
    found: dict[Name, list[Compiled]] = {name: [] for name in programs}

    def compile_one(name: Name) -> None:
        function, args = programs[name]
        found[name].append(compiled(function, *args))

    turns = {name: functools.partial(compile_one, name) for name in programs}
    for _ in in_turn(turns, num_repeats):
        pass
    return {
        name: several[-1]._replace(seconds=float(np.median([c.seconds for c in several[1:]])))
        for name, several in found.items()
    }


def in_turn(
    programs: Mapping[Name, Callable[[], object]],
    num_repeats: int,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Iterator[tuple[int, dict[Name, float]]]:
    """Runs all programs, turn after turn, every other turn in reverse order.

    The first turn, which compiles and fills caches, is not counted.

    Yields:
        The number of the turn, from 1, and the seconds of each program in it.
    """
    for turn in range(num_repeats + 1):
        seconds = {}
        for i, name in enumerate(sorted(programs, key=list(programs).index, reverse=turn % 2 == 1)):
            progress((turn + i / len(programs)) / (num_repeats + 1))
            begun = time.perf_counter()
            jax.block_until_ready(programs[name]())
            seconds[name] = time.perf_counter() - begun
        if turn:
            yield turn, seconds

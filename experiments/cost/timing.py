"""How programs are timed and sized: in turn, as a machine changes its pace; memory as planned."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Compiled(NamedTuple):
    """A program, ready to run.

    Attributes:
        call: It, without tracing.
        seconds: Of tracing and compiling.
        mebibytes: Its peak as XLA plans it: arguments, results and temporaries, what is donated
            counted once.
        temporaries: Its temporaries alone, in bytes.
    """

    call: Callable[..., Any]
    seconds: float
    mebibytes: float
    temporaries: int


def compiled(function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Compiled:
    """Compiles a function for these arguments, past the caches of programs in memory."""
    begun = time.perf_counter()
    program = jax.jit(lambda *args: function(*args), donate_argnums=donate).lower(*args).compile()
    seconds = time.perf_counter() - begun
    plan: Any = program.memory_analysis()
    size = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    size -= plan.alias_size_in_bytes
    return Compiled(program, seconds, size / 2**20, plan.temp_size_in_bytes)


def compiled_in_turn(
    programs: Mapping[Any, tuple[Callable[..., Any], tuple[Any, ...]]], num_repeats: int
) -> dict[Any, Compiled]:
    """Compiles every (function, args), turn after turn; ``seconds`` are the medians.

    With a persistent compilation cache they are those of reading it.
    """
    found: dict[Any, list[Compiled]] = {name: [] for name in programs}

    def compile_one(name: Any) -> None:
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
    programs: Mapping[Any, Callable[[], Any]],
    num_repeats: int,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Iterator[tuple[int, dict[Any, float]]]:
    """Runs all programs, turn after turn, every other one backwards.

    The first turn, which compiles and fills caches, is not counted.

    Yields:
        The turn, from 1, and the seconds that each program took in it.
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

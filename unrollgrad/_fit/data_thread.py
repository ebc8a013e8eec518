"""Streamed data, made in a thread of its own while the device computes."""

import contextlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp


@contextlib.contextmanager
def prefetched(data: Any, done: int, num_steps: int, size: int) -> Iterator[Iterator[Any]]:
    """Yields the batches of dispatch after dispatch; each is made while the one before computes."""
    if data is None:
        yield itertools.repeat(None)
        return

    def batch(step):
        if callable(data):
            return data(step)
        try:
            return next(data)
        except StopIteration:
            raise ValueError(
                f"`data` ended before outer step {step}. Use an iterator that goes on, such as "
                "itertools.cycle(batches), or fewer steps."
            ) from None

    closing = threading.Event()

    def make(first):
        batches = []
        for step in range(first, min(first + size, num_steps)):
            if closing.is_set():  # nobody waits for them any more
                raise CancelledError
            batches.append(batch(step))
        return batches + [batches[-1]] * (size - len(batches))  # the last dispatch does not reach

    def stacked(batches):
        return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(b) for b in x]), *batches)

    # Of several processes all must dispatch in the same order: then the main thread stacks.
    together = jax.process_count() > 1
    ahead_of = make if together else lambda first: stacked(make(first))

    def chunks():
        ahead = pool.submit(ahead_of, done)
        for first in range(done + size, num_steps + size, size):
            ready = ahead.result()
            if first < num_steps:
                ahead = pool.submit(ahead_of, first)
            yield stacked(ready) if together else ready

    with ThreadPoolExecutor(max_workers=1) as pool:
        if not callable(data):
            for step in range(done):
                batch(step)
        try:
            yield chunks()
        finally:
            closing.set()

"""Streamed data, made in a separate thread while the device computes."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import jax
import jax.numpy as jnp

from unrollgrad._core.contexts import own_transfers, worker_thread


@contextlib.contextmanager
def prefetched(
    data: Callable[..., object] | Iterator[object] | None, done: int, num_steps: int, size: int
) -> Iterator[Iterator[Any]]:
    """Yields each dispatch's batches, which are made while the dispatch before it computes."""
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
    main_stacks = jax.process_count() > 1  # processes must dispatch in the same order

    def make(first):
        batches = []
        for step in range(first, min(first + size, num_steps)):
            if closing.is_set():  # nobody waits for them any more
                raise CancelledError
            batches.append(batch(step))
        # The last dispatch does not use the copies that fill its batches up.
        batches += [batches[-1]] * (size - len(batches))
        return batches if main_stacks else stacked(batches)

    def stacked(batches):
        with own_transfers():
            return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(b) for b in x]), *batches)

    def chunks():
        ahead = pool.submit(make, done)
        for first in range(done + size, num_steps + size, size):
            ready = ahead.result()
            if first < num_steps:
                ahead = pool.submit(make, first)
            yield stacked(ready) if main_stacks else ready

    with worker_thread() as pool:
        if not callable(data):
            for step in range(done):
                batch(step)
        try:
            yield chunks()
        finally:
            closing.set()

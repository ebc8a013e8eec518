"""JAX's context managers: threads that keep them, and transfers that are meant.

A context manager of JAX holds in the thread that enters it: work that is handed to another thread
would lose it.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax

_OPTIONS = (
    "enable_x64",
    "default_matmul_precision",
    "default_device",
    "default_prng_impl",
    "threefry_partitionable",
    "numpy_dtype_promotion",
    "numpy_rank_promotion",
    "debug_nans",
    "debug_infs",
    "debug_key_reuse",
    "disable_jit",
    "transfer_guard_host_to_device",
    "transfer_guard_device_to_device",
    "transfer_guard_device_to_host",
)


def worker_thread() -> ThreadPoolExecutor:
    """A pool of one thread, which works under the contexts of the thread that calls this."""
    here, entered = _values(), contextlib.ExitStack()

    def enter():
        there = _values()
        for name, value in here.items():
            if value != there[name]:
                entered.enter_context(getattr(jax, name)(value))

    return ThreadPoolExecutor(max_workers=1, initializer=enter)


@contextlib.contextmanager
def own_transfers() -> Iterator[None]:
    """Allows the transfers that the library means: constants of a first state, keys on a mesh.

    Without it ``jax.transfer_guard("disallow")``, which is to find transfers that a user makes by
    mistake, would refuse them too.
    """
    with jax.transfer_guard_host_to_device("allow"), jax.transfer_guard_device_to_device("allow"):
        yield


def _values() -> dict[str, object]:
    return {name: getattr(jax.config, f"jax_{name}") for name in _OPTIONS}

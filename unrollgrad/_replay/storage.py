"""Where states are kept: on the devices, in the memory of the host, or as files in a folder."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._core.contexts import worker_thread
from unrollgrad._fit import files
from unrollgrad._fit.checkpoints import lock
from unrollgrad._workers.mesh import on_all_processes, on_any_process

SECONDS = 30.0
"""After so much work without a file, a state on the way is written too."""


class Storage(NamedTuple):
    """Trees of one form, by place.

    Attributes:
        keep: ``keep(place, tree)`` stores a copy.
        note: ``note(place, tree)`` does so if the way to there took long and a kill would lose it.
        find: ``find(place) -> tree`` makes a copy of what is stored.
        drop: ``drop(place)`` forgets it.
        places: The places at which something is stored.
    """

    keep: Callable[[int, Any], None]
    note: Callable[[int, Any], None]
    find: Callable[[int], Any]
    drop: Callable[[int], None]
    places: Callable[[], set[int]]


def in_memory(like: Any, number: int) -> Storage:
    """Keeps up to ``number`` trees on the devices if half of their free memory holds them.

    Else they are in the memory of the host.
    """
    there = not on_any_process(not _fit_on_devices(like, number))
    form = form_of(like)
    stored: dict[int, Any] = {}

    def keep(place, tree):
        stored[place] = jax.tree.map(jnp.copy, tree) if there else packed(tree)

    def find(place):
        found = stored[place]
        return jax.tree.map(jnp.copy, found) if there else unpacked(form, found)

    return Storage(keep, _nothing, find, stored.pop, lambda: set(stored))


def nowhere() -> Storage:
    """Keeps nothing."""
    return Storage(_nothing, _nothing, _nothing, _nothing, set)


def _nothing(*args: object) -> None:
    """Does nothing."""


def on_disk(folder: Path, name: str, like: Any, queue: "Queue") -> Storage:
    """Keeps trees as files ``name-PLACE.npz``, written whole or not at all, in the background.

    Raises:
        OSError: In its functions, if a file cannot be written or read.
    """
    found = _places(folder, name)
    stored = on_all_processes(found)
    shapes: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), packed(like))
    form = form_of(like)

    def path(place):
        return folder / f"{name}-{place}.npz"

    for place in found - stored:  # one that another process lacks
        path(place).unlink()
    written = time.monotonic()

    def keep(place, tree):
        nonlocal written
        tree = packed(tree)  # now, since the next dispatch takes the buffers over
        queue.put(lambda: files.save(path(place), tree, np.savez))
        stored.add(place)
        written = time.monotonic()

    def note(place, tree):
        if time.monotonic() - written > SECONDS:
            keep(place, tree)

    def find(place):
        queue.finish()
        try:
            return unpacked(form, files.like(shapes, files.load(path(place)), ""))
        except ValueError as error:
            raise OSError(
                f"{path(place)} is damaged: {error}. Delete it, and run the same call again."
            ) from error

    def drop(place):
        stored.discard(place)
        queue.put(lambda: path(place).unlink(missing_ok=True))

    return Storage(keep, note, find, drop, lambda: set(stored))


class Queue(NamedTuple):
    """Work on files, done in order by a thread; at most one piece of it waits.

    Attributes:
        worker: The thread.
        pending: What is not done yet.
    """

    worker: ThreadPoolExecutor
    pending: list[Future]

    def put(self, work: Callable[[], object]) -> None:
        """Adds a piece of work; raises what the ones before it raised."""
        while len(self.pending) > 2:
            self.pending.pop(0).result()
        self.pending.append(self.worker.submit(work))

    def finish(self) -> None:
        """Waits until all is done."""
        while self.pending:
            self.pending.pop(0).result()


@contextlib.contextmanager
def opened(folder: str | Path, about: dict[str, object]) -> Iterator[tuple[Path, Queue]]:
    """Locks this process's part of the folder, which belongs to one computation, ``about``.

    Raises:
        ValueError: If it holds another computation, or files of which it does not say.
        RuntimeError: If another process uses it.
        OSError: If it cannot be read or written.
    """
    folder = Path(folder).expanduser().absolute() / f"process-{jax.process_index()}"
    with lock(folder), worker_thread() as worker:
        file = folder / "about.json"
        if not (file.exists() or _places(folder, "state") or _places(folder, "pulled")):
            part = file.with_suffix(".part")
            part.write_text(json.dumps(about))
            part.replace(file)
        held = _read(file)
        differing = [name for name in about if held.get(name) != about[name]]
        if on_any_process(bool(differing)):
            raise ValueError(
                f"{folder} holds another computation. There -> here:\n"
                + "\n".join(f"  {name}: {held.get(name)} -> {about[name]}" for name in differing)
                + "\nGo on with the same arguments, or use another folder."
            )
        queue = Queue(worker, [])
        yield folder, queue
        queue.finish()


def _read(file: Path) -> dict[str, object]:
    """What the folder says that it is about; nothing if it does not say so."""
    try:
        held = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _places(folder: Path, name: str) -> set[int]:
    """The places of which there are files."""
    found = (file.stem.removeprefix(f"{name}-") for file in folder.glob(f"{name}-*.npz"))
    return {int(place) for place in found if place.isdecimal()}


class Leaf(NamedTuple):
    """What is known of an array without its numbers.

    Attributes:
        shape: Its shape, with the words of a key as the last axis.
        dtype: Its dtype; of a key the dtype of the words.
        sharding: Its layout on the devices.
        committed: Whether it is bound to them.
        key_impl: The implementation of keys, or None.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: jax.sharding.Sharding
    committed: bool
    key_impl: Any


class Form(NamedTuple):
    """What is known of a tree of arrays without its numbers.

    Attributes:
        structure: Its structure.
        leaves: Its leaves.
    """

    structure: Any
    leaves: list[Leaf]


def form_of(tree: Any) -> Form:
    """The form of a tree of arrays."""

    def leaf(x):
        impl = jax.random.key_impl(x) if _is_key(x) else None
        x = _words(x)
        return Leaf(x.shape, x.dtype, x.sharding, x.committed, impl)

    leaves, structure = jax.tree.flatten(tree)
    return Form(structure, [leaf(x) for x in leaves])


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _words(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if _is_key(x) else x


def processes() -> dict[str, object]:
    """How many processes share the work, as a part of what a folder is about."""
    return {"processes": jax.process_count()}


def packed(tree: Any) -> list[list[np.ndarray]]:
    """The tree as arrays of this process: of every leaf its different parts on the devices."""
    return [[np.array(part) for part in _parts(_words(x))] for x in jax.tree.leaves(tree)]


def _parts(x: jax.Array) -> list[jax.Array]:
    shards = {shard.device: shard.data for shard in x.addressable_shards}
    return [shards[devices[0]] for devices in _devices(x).values()]


def _devices(x: jax.Array | Leaf) -> dict[str, list[jax.Device]]:
    """This process's devices, by the part of the array that they hold."""
    found: dict[str, list[jax.Device]] = {}
    for device, part in x.sharding.addressable_devices_indices_map(x.shape).items():
        found.setdefault(str(part), []).append(device)
    return found


def unpacked(form: Form, packed: list[list[np.ndarray]]) -> Any:
    """The inverse of ``packed``, for a tree of this form."""
    both = zip(form.leaves, packed, strict=True)
    return jax.tree.unflatten(form.structure, [_joined(leaf, parts) for leaf, parts in both])


def _joined(leaf: Leaf, parts: list[np.ndarray]) -> jax.Array:
    if leaf.committed:
        placed = {
            device: jax.device_put(part, device)
            for part, devices in zip(parts, _devices(leaf).values(), strict=True)
            for device in devices
        }
        order = leaf.sharding.addressable_devices_indices_map(leaf.shape)
        x = jax.make_array_from_single_device_arrays(
            leaf.shape, leaf.sharding, [placed[device] for device in order]
        )
    else:
        x = jnp.asarray(parts[0])
    return x if leaf.key_impl is None else jax.random.wrap_key_data(x, impl=leaf.key_impl)


def _fit_on_devices(like: Any, number: int) -> bool:
    """Whether so many trees take less than half of the free memory of every device."""
    needed: dict[jax.Device, int] = {}
    for x in jax.tree.leaves(like):
        for shard in _words(x).addressable_shards:
            needed[shard.device] = needed.get(shard.device, 0) + number * shard.data.nbytes
    return all(fits(size, device.memory_stats()) for device, size in needed.items())


def fits(size: int, stats: dict[str, int] | None) -> bool:
    """Whether so many bytes are less than half of the free ones; a device may not tell."""
    if not stats or "bytes_limit" not in stats:
        return True
    return 2 * size < stats["bytes_limit"] - stats["bytes_in_use"]

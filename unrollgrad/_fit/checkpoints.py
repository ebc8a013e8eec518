"""Checkpoints of a run: written whole or not at all, by one process, the last and best kept."""

import contextlib
import functools
import itertools
import operator
import os
import re
import socket
import textwrap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments
from unrollgrad._core.contexts import worker_thread
from unrollgrad._core.optional_packages import need
from unrollgrad._workers.mesh import on_any_process
from unrollgrad.types import Key

_Tree = TypeVar("_Tree")
_History = dict[str, dict[str, np.ndarray]]  # records by kind and name


class Checkpoints(NamedTuple):
    """A folder of checkpoints, open for one run.

    Attributes:
        folder: The folder.
        manager: The checkpoint manager of orbax.
        writer: The thread in which the manager saves.
        writing: The pending write, if any.
    """

    folder: Path
    manager: Any
    writer: ThreadPoolExecutor
    writing: list[Future[None]]

    def save(
        self, step: int, tree: object, history: _History, about: dict[str, object], loss: float
    ) -> None:
        """Writes a checkpoint in the background, after the pending one is on the disk.

        A resumed run must match ``about``; the checkpoint with the lowest ``loss`` is the best.
        Raises OSError if this checkpoint or the pending one cannot be written.
        """
        self.finish()
        args = need("orbax.checkpoint", "orbax").args
        items = args.Composite(
            # Copies, since the next dispatch reuses the buffers.
            run=args.StandardSave([jnp.copy(x) for x in _plain(tree)]),
            history=args.StandardSave(history),
            about=args.JsonSave(about),
        )
        # orbax saves asynchronously itself, but when a write fails (0.12) some of its threads wait
        # five minutes for the others. In a thread of ours its synchronous saving fails at once.
        save = functools.partial(self.manager.save, step, args=items, metrics={"loss": loss})
        self.writing.append(self.writer.submit(save))

    def finish(self) -> None:
        """Waits for the pending write; raises OSError if it fails."""
        while self.writing:
            with _write_errors(self.folder):
                self.writing.pop().result()

    def newest(self) -> int | None:
        """The step of the newest checkpoint on the disk, for messages."""
        with contextlib.suppress(OSError):
            self.finish()
        return max(_steps(self.folder), default=None)

    def restore(
        self, like: _Tree, about: dict[str, object], num_steps: int
    ) -> tuple[int, _Tree, _History] | None:
        """The newest checkpoint's step, tree (laid out as ``like``) and history, if there is one.

        Raises:
            ValueError: If it is beyond ``num_steps``, or belongs to another run (the message lists
                the differences).
            OSError: If it cannot be read; the message says from which step the run could resume.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        args = need("orbax.checkpoint", "orbax").args
        with _read_errors(self.folder):
            found = self.manager.restore(step, args=args.Composite(about=args.JsonRestore()))
        differences = "\n".join(_differences("", found["about"], about))
        if differences:
            raise ValueError(
                f"{self.folder} holds another run. There -> here:\n{differences}\n"
                "Go on with the same arguments, or use another checkpoint_dir."
            )
        if step > num_steps:
            raise ValueError(
                f"`num_steps` is {num_steps}, but the run in {self.folder} has done {step} steps. "
                "Ask for as many or more, or use another checkpoint_dir."
            )
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in _plain(like)]
        items = args.Composite(run=args.StandardRestore(shapes), history=args.StandardRestore())
        with _read_errors(self.folder):
            found = self.manager.restore(step, args=items)
        return step, _typed(like, found["run"]), jax.tree.map(np.asarray, found["history"])


def _steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints; half-written ones have other names."""
    names = [file.name for file in (folder / "steps").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


@contextlib.contextmanager
def _read_errors(folder: Path) -> Iterator[None]:
    """Turns any exception into an OSError that says how to do without the newest checkpoint."""
    try:
        yield
    except Exception as error:
        *before, newest = _steps(folder) or [0]
        then = f"go on from step {before[-1]}" if before else "begin anew"
        raise OSError(
            f"the checkpoint of step {newest} in {folder} is damaged: "
            f"{textwrap.shorten(str(error), 200)}. Delete {folder / 'steps'}/{newest} to {then}."
        ) from error


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turns any exception into an OSError that says what is left."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"a checkpoint could not be written to {folder}: {textwrap.shorten(str(error), 400)}. "
            "Those before it are whole; make room or mend the folder, and run the same call again."
        ) from error


@contextlib.contextmanager
def opened(folder: str | Path | None) -> Iterator[Checkpoints | None]:
    """Locks the folder, as ``lock`` does, and yields its checkpoints, or None without a folder."""
    if folder is None:
        yield None
        return
    ocp = need("orbax.checkpoint", "orbax")
    policies = need("orbax.checkpoint.checkpoint_managers", "orbax")
    best = policies.BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=1)
    folder = _local(folder)
    with _locked(folder), worker_thread() as writer:
        (folder / "steps").mkdir(exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
            best_fn=lambda metrics: metrics["loss"],  # without it orbax does not write the loss
            best_mode="min",
            create=False,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            # With named processes orbax waits at barriers of jax.distributed, as a thread may;
            # otherwise in a computation over all devices, which may cross the main thread's.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count()))
            ),
        )
        with _read_errors(folder):
            manager = ocp.CheckpointManager(folder / "steps", options=options)
        try:
            yield Checkpoints(folder, manager, writer, [])
        finally:
            manager.close()


def _local(folder: str | Path) -> Path:
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(folder)):
        raise ValueError(
            f"`checkpoint_dir` must be a folder of this machine; got {str(folder)!r}. Mount the "
            "bucket (gcsfuse, mount-s3) and name the folder, or copy the checkpoints afterwards."
        )
    return Path(folder).expanduser().absolute()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the folder in process 0, on behalf of all processes."""
    error: Exception | None = None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                stack.enter_context(lock(folder))
            except (OSError, RuntimeError) as caught:
                error = caught
        if on_any_process(error is not None):
            raise error or RuntimeError(f"process 0 could not open {folder}; see its message.")
        yield


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Locks the folder; the lock ends with the process, however that ends.

    Raises:
        OSError: If the folder cannot be written to.
        RuntimeError: If another process has locked it; the message names the process.
    """
    import fcntl  # here, since Windows lacks it and only checkpoints need it

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"{folder} is in use by {file.read().strip() or 'another process'}. Wait for it, "
                "stop it, or use another folder."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(tree: object) -> list[jax.Array]:
    """The leaves as a file can hold them: keys become their data, empty leaves are left out."""
    leaves = [x for x in jax.tree.leaves(tree) if x.size]
    return [jax.random.key_data(x) if _is_key(x) else x for x in leaves]


def _typed(like: _Tree, leaves: list[jax.Array]) -> _Tree:
    """The inverse of ``_plain``, for a tree with the structure of ``like``."""
    found = iter(leaves)

    def typed(x):
        if not x.size:
            return x
        new = next(found)
        return jax.random.wrap_key_data(new, impl=jax.random.key_impl(x)) if _is_key(x) else new

    return jax.tree.map(typed, like)


def about(tree: object, key: Key, config: object) -> dict[str, object]:
    """The description that a resumed run must match, as JSON: structure, key and configuration.

    Raises ValueError if there are several processes and an array of the tree is local to one.
    """
    if jax.process_count() > 1 and any(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        raise ValueError(
            "`checkpoint_dir` of several processes needs workers that are spread over all of "
            "them: ug.average(..., mesh=ug.make_worker_mesh())."
        )
    leaves = {
        jax.tree_util.keystr(path): arguments.describe(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {
        "state": leaves,
        # The address of a function differs between processes.
        "structure": re.sub(r" at 0x[0-9a-f]+", "", str(jax.tree.structure(tree))),
        "key": f"{jax.random.key_impl(key)} {np.asarray(jax.random.key_data(key)).tolist()}",
        "config": config,
    }


def _differences(name: str, theirs: object, ours: object) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(k for k in ours if k not in theirs)]:
            both = (x.get(key, "absent") for x in (theirs, ours))
            yield from _differences(f"{name}.{key}".lstrip("."), *both)
    elif theirs != ours:
        if isinstance(theirs, str) and isinstance(ours, str):
            theirs, ours = _where_they_differ(theirs, ours)
        yield f"  {name}: {theirs} -> {ours}"


def _where_they_differ(a: str, b: str, around: int = 30, short: int = 120) -> tuple[str, str]:
    """Cuts two long texts down to the part in which they differ."""
    if max(len(a), len(b)) <= short:
        return a, b
    first = _agree(a, b)
    last = _agree(a[first:][::-1], b[first:][::-1])

    def part(x):
        return f"...{x[max(first - around, 0) : len(x) - last + around]}..."

    return part(a), part(b)


def _agree(a: str, b: str) -> int:
    """The length of the common beginning of two texts."""
    return len(list(itertools.takewhile(bool, map(operator.eq, a, b))))

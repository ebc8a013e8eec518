"""Checkpoints of a run: whole or not at all, the last and the best kept, one writer at a time."""

import contextlib
import functools
import os
import re
import socket
import textwrap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments
from unrollgrad._core.optional_packages import need
from unrollgrad._workers.mesh import on_any_process

KEPT = 2
"""The newest that are kept, besides the best."""


class Checkpoints(NamedTuple):
    """A folder of checkpoints, open for one run.

    Attributes:
        folder: Where they are.
        latest: The step of the newest; None where there is none.
        manager: orbax's.
        writer: The thread in which the manager saves.
        writing: What it is at, one future or none.
    """

    folder: Path
    latest: int | None
    manager: Any
    writer: ThreadPoolExecutor
    writing: list[Future[Any]]

    def save(
        self, step: int, tree: Any, history: dict[str, Any], about: dict[str, Any], loss: float
    ) -> None:
        """Writes a checkpoint in the background, once the one before is on the disk.

        Args:
            step: Its number.
            tree: The run, any pytree of arrays and keys.
            history: Nested dicts of numpy arrays.
            about: What a run that goes on from here has to have in common with this one.
            loss: The best checkpoint is that of the least.

        Raises:
            OSError: If it, or the one before, cannot be written.
        """
        self.finish()
        args = need("orbax.checkpoint", "orbax").args
        items = args.Composite(
            # Copies, since the buffers are the next dispatch's to reuse.
            run=args.StandardSave([jnp.copy(x) for x in _plain(tree)]),
            history=args.StandardSave(history),
            about=args.JsonSave(about),
        )
        # orbax saves asynchronously itself, but when a write fails (0.12) some of its threads wait
        # five minutes for the others. In a thread of ours its synchronous saving fails at once.
        save = functools.partial(self.manager.save, step, args=items, metrics={"loss": loss})
        self.writing.append(self.writer.submit(save))

    def finish(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
            OSError: If it cannot be written.
        """
        while self.writing:
            with _said(self.folder):
                self.writing.pop().result()

    def newest(self) -> int | None:
        """The step of the newest that is on the disk now, for messages."""
        with contextlib.suppress(OSError):
            self.finish()
        return max(_steps(self.folder), default=None)

    def restore(self, like: Any, about: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The newest run, laid out over the devices as ``like`` is, and its history.

        Raises:
            ValueError: If it is another run's; the message lists the differences.
            OSError: If it cannot be read; the message says from which step the run could go on.
        """
        args = need("orbax.checkpoint", "orbax").args
        with _readable(self.folder):
            found = self.manager.restore(self.latest, args=args.Composite(about=args.JsonRestore()))
        _check_same(self.folder, found["about"], about)
        plain = _plain(like)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), plain
        )
        items = args.Composite(run=args.StandardRestore(shapes), history=args.StandardRestore())
        with _readable(self.folder):
            found = self.manager.restore(self.latest, args=items)
        return _typed(like, found["run"]), jax.tree.map(np.asarray, found["history"])


def _steps(folder: Path) -> list[int]:
    """The steps whose checkpoints are there and whole: half-written ones have other names."""
    names = [file.name for file in (folder / "steps").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turns whatever goes wrong in reading the newest into an OSError that says what to do."""
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
def opened(folder: str | Path | None) -> Iterator[Checkpoints | None]:
    """Yields the folder's checkpoints, or None without a folder.

    Raises:
        OSError: If the folder cannot be written to.
        RuntimeError: If another process has it open.
    """
    if folder is None:
        yield None
        return
    ocp = need("orbax.checkpoint", "orbax")
    policies = need("orbax.checkpoint.checkpoint_managers", "orbax")
    folder = Path(folder).absolute()
    with _locked(folder), ThreadPoolExecutor(max_workers=1) as writer:
        (folder / "steps").mkdir(exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(KEPT),
                    policies.BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=1),
                ]
            ),
            best_fn=lambda metrics: metrics["loss"],  # without it the loss is not written down
            best_mode="min",
            create=False,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            # Named processes meet at barriers of jax.distributed, which a thread may wait at;
            # unnamed, in a computation over all devices, which may cross one of the main thread's.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count()))
            ),
        )
        with _readable(folder):
            manager = ocp.CheckpointManager(folder / "steps", options=options)
            latest = manager.latest_step()
        try:
            yield Checkpoints(folder, latest, manager, writer, [])
        finally:
            manager.close()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, by process 0 for all of them."""
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
        RuntimeError: If another process has it; the message names it.
    """
    import fcntl  # here: Windows has none, and needs it only where checkpoints are wanted

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"{folder} is in use by {file.read().strip() or 'another process'}. Wait for it, "
                "stop it, or use another checkpoint_dir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextlib.contextmanager
def _said(folder: Path) -> Iterator[None]:
    """Turns whatever goes wrong in writing into an OSError that says what is left."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"a checkpoint could not be written to {folder}: {textwrap.shorten(str(error), 400)}. "
            "Those before it are whole; make room or mend the folder, and run the same call again."
        ) from error


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(tree: Any) -> list[Any]:
    """The leaves, keys as their data: what a file can hold."""
    return [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(tree)]


def _typed(like: Any, leaves: list[Any]) -> Any:
    def leaf(x, found):
        return jax.random.wrap_key_data(found, impl=jax.random.key_impl(x)) if _is_key(x) else found

    old, structure = jax.tree.flatten(like)
    return structure.unflatten([leaf(x, found) for x, found in zip(old, leaves, strict=True)])


def about(tree: Any, key: Any, config: Any) -> dict[str, Any]:
    """What must be the same in a run that goes on: structure, key and configuration, as JSON.

    Raises:
        ValueError: If there are several processes and the tree is one process's own.
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
        # Functions in it have another address in every process.
        "structure": re.sub(r" at 0x[0-9a-f]+", "", str(jax.tree.structure(tree))),
        "key": f"{jax.random.key_impl(key)} {np.asarray(jax.random.key_data(key)).tolist()}",
        "config": config,
    }


def _check_same(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    lines = list(_differences("", theirs, ours))
    if lines:
        raise ValueError(
            f"{folder} holds another run. There -> here:\n"
            + "\n".join(lines)
            + "\nGo on with the same arguments, or use another checkpoint_dir."
        )


def _differences(name: str, theirs: Any, ours: Any) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(k for k in ours if k not in theirs)]:
            yield from _differences(
                f"{name}.{key}".lstrip("."), theirs.get(key, "absent"), ours.get(key, "absent")
            )
    elif theirs != ours:
        if isinstance(theirs, str) and isinstance(ours, str):
            theirs, ours = _where_they_differ(theirs, ours)
        yield f"  {name}: {theirs} -> {ours}"


def _where_they_differ(a: str, b: str, around: int = 30, short: int = 120) -> tuple[str, str]:
    """Long texts are cut down to where they differ."""
    if max(len(a), len(b)) <= short:
        return a, b
    first = _agree(a, b)
    last = _agree(a[first:][::-1], b[first:][::-1])

    def part(x):
        return f"...{x[max(first - around, 0) : len(x) - last + around]}..."

    return part(a), part(b)


def _agree(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))

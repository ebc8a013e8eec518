"""The devices over which workers are spread."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from unrollgrad._checks import arguments
from unrollgrad.types import ArrayTree


def make_worker_mesh(
    devices: int | Sequence[jax.Device] | None = None, *, axis: str = "workers"
) -> Mesh:
    """A mesh with one axis, over which ``average(mesh=)`` spreads its workers.

    After ``jax.distributed.initialize()`` jax sees the devices of all processes.

    Args:
        devices: The devices, or their number; by default all devices that jax sees.
        axis: The name of the axis; its type is Auto.

    Raises:
        ValueError: If there are fewer devices, or a device is named twice.
        TypeError: If ``devices`` is neither a whole number nor devices.

    Example:
        >>> import unrollgrad as ug
        >>> dict(ug.make_worker_mesh(1).shape)
        {'workers': 1}
    """
    if devices is None:
        devices = jax.devices()
    elif np.ndim(devices) == 0:
        devices = jax.devices()[: arguments.num_devices(devices)]
    devices = list(np.ravel(np.asarray(devices, object)))
    if not devices or not all(isinstance(device, jax.Device) for device in devices):
        raise TypeError(
            f"`devices` must be a number or devices, such as jax.devices()[:4]; got {devices!r}."
        )
    if len(set(devices)) < len(devices):
        raise ValueError(f"`devices` names one twice: {devices!r}.")
    return jax.make_mesh((len(devices),), (axis,), axis_types=(AxisType.Auto,), devices=devices)


def axis_size(mesh: Mesh, axis: str) -> int:
    """Returns the number of devices along ``axis``.

    Raises:
        TypeError: If ``mesh`` is not a ``jax.sharding.Mesh``.
        ValueError: If it lacks the axis, has one that is not Auto, or no device of this process.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"`mesh` must be a jax.sharding.Mesh; got {type(mesh).__name__}. Make it with "
            "ug.make_worker_mesh()."
        )
    if axis not in mesh.axis_names:
        raise ValueError(
            f"`mesh` has no axis {axis!r}; its axes are {', '.join(map(repr, mesh.axis_names))}. "
            "Name one of them, `average(..., axis=...)`, or use ug.make_worker_mesh()."
        )
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind is not AxisType.Auto:
            raise ValueError(
                f"`average` needs a mesh whose axes are Auto; axis {name!r} is {kind.name}, which "
                "makes the sharding part of every array's type, and `step` is not written for "
                "that. Build it with ug.make_worker_mesh(), or with "
                "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,))."
            )
    if not mesh.local_devices:
        raise ValueError(
            f"`mesh` has no device of process {jax.process_index()}: every process has to take "
            "part. Use all devices, ug.make_worker_mesh()."
        )
    return mesh.shape[axis]


def over_axis(
    function: Callable[..., Any],
    mesh: Mesh,
    axis: str,
    specs: tuple[Any, Any],
    layout: Callable[..., Any],
) -> Callable[..., Any]:
    """Compiles a function of which every device along ``axis`` runs its own part.

    Over further axes of the mesh the arrays may be spread as they like: XLA divides the work.

    Args:
        function: The function of one device along ``axis``, or of all that share that place.
        mesh: The devices.
        axis: The axis.
        specs: Where the axis is in the arguments and in what is returned, as in ``shard_map``.
        layout: ``layout(*shardings of the arguments)`` is the layout of what is returned on a mesh
            with further axes; None where XLA may choose.
    """
    in_specs, out_specs = specs
    # `check_vma=False`, as in jax.pmap: the types do not say what differs between devices. Else
    # loops in `step` that begin with constants, right on one device, would be refused here.
    spread = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={axis},
        check_vma=False,
    )
    ins, outs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    alone = jax.jit(spread, out_shardings=outs)

    @functools.lru_cache(maxsize=8)
    def laid_out(structure, shardings):
        return jax.jit(spread, out_shardings=structure.unflatten(shardings))

    def program(args):
        if mesh.size == mesh.shape[axis]:
            return alone
        shardings, structure = jax.tree.flatten(layout(*map(_shardings, args)), _is_none)
        return laid_out(structure, tuple(shardings))

    def call(*args):
        args = [placed(x, sharding, axis) for x, sharding in zip(args, ins, strict=True)]
        try:
            return program(args)(*args)
        except ValueError as error:
            if "context mesh" not in str(error):
                raise
            raise ValueError(
                "`average(mesh=)` cannot run where another mesh is in force: inside a `shard_map` "
                "or `pmap` (of yours, or of `compare(devices=)`), or under `jax.set_mesh` with "
                "another one. There leave `mesh` out: `average` without it, or the estimator "
                "itself, is right on every device."
            ) from error

    return call


def _shardings(tree: ArrayTree | None) -> Any:
    """The shardings of a tree's arrays; None for those that are traced."""
    return jax.tree.map(lambda x: None if isinstance(x, jax.core.Tracer) else x.sharding, tree)


def _is_none(x: object) -> bool:
    return x is None


def placed(
    tree: ArrayTree | None, sharding: NamedSharding, axis: str | None = None
) -> ArrayTree | None:
    """Lays concrete arrays out over the mesh, so that all calls share one layout and program.

    With ``axis``, ``sharding`` only says where this axis of the mesh belongs: an array that has it
    there, and is spread over further axes of the mesh, stays so.
    """

    def leaf(x):
        if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and x.sharding == sharding):
            return x
        if axis and _is_spread_further(getattr(x, "sharding", None), sharding, axis):
            return x
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return _on_all_processes(x, sharding)  # device_put would compare x over all processes

    return jax.tree.map(leaf, tree)


def _is_spread_further(given: object, wanted: NamedSharding, axis: str) -> bool:
    """Whether ``given`` is ``wanted`` but for axes of the mesh other than ``axis``."""
    if not isinstance(given, NamedSharding) or given.mesh != wanted.mesh:
        return False
    names = [name if isinstance(name, tuple) else (name,) for name in given.spec]
    further = any(set(some) - {axis, None} for some in names)
    with_axis = {i: some for i, some in enumerate(names) if axis in some}
    return further and with_axis == {i: (name,) for i, name in enumerate(wanted.spec)}


@functools.partial(jax.jit, static_argnums=1)
def _on_all_processes(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, sharding)


def on_any_process(flag: bool) -> bool:
    """Returns whether ``flag`` is set in any process; all processes must call this."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils  # takes long to import

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def on_all_processes(numbers: set[int]) -> set[int]:
    """Returns the numbers, at least 0, that every process has; all processes must call this."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils  # takes long to import

    most = np.max(multihost_utils.process_allgather(np.asarray(max(numbers, default=0))))
    have = np.asarray([i in numbers for i in range(int(most) + 1)])
    return {int(i) for i in np.flatnonzero(np.all(multihost_utils.process_allgather(have), axis=0))}

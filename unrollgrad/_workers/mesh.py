"""The devices over which workers are spread."""

import functools
from collections.abc import Sequence

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


def placed(tree: ArrayTree | None, sharding: NamedSharding) -> ArrayTree | None:
    """Lays concrete arrays out over the mesh, so that all calls share one layout and program."""

    def leaf(x):
        if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and x.sharding == sharding):
            return x
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return _on_all_processes(x, sharding)  # device_put would compare x over all processes

    return jax.tree.map(leaf, tree)


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

"""One run on many devices, of one process or of several that work together."""

import dataclasses
from typing import Literal

import jax


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of several processes this one is; each is started with the same command."""

    processes: int | Literal["auto"] = 1
    """How many processes work together. auto: as many as Slurm, Open MPI or a TPU pod started."""
    process: int = 0
    """Which of them this one is, counted from 0; process 0 writes the results."""
    coordinator: str = "localhost:12355"
    """HOST:PORT at which process 0 is reached by the others."""


def join(group: Processes, devices: int | None) -> None:
    """Joins the other processes and sets the number of devices; before jax computes anything.

    Args:
        group: The processes.
        devices: All processes' devices; None: all that there are. Only CPUs can be told how many.

    Raises:
        ValueError: If the numbers do not fit together.
        RuntimeError: If the others are not reached.
    """
    if group.processes == "auto":
        jax.distributed.initialize()
        return
    if not 0 <= group.process < group.processes:
        raise ValueError(
            f"`--process` counts from 0 to `--processes` - 1; got --process {group.process} "
            f"--processes {group.processes}."
        )
    if devices is not None:
        if devices < 1 or devices % group.processes:
            raise ValueError(
                f"`--devices` must be a multiple of `--processes`, those of all together; got "
                f"--devices {devices} --processes {group.processes}."
            )
        if devices > group.processes:
            jax.config.update("jax_num_cpu_devices", devices // group.processes)
            jax.config.update("jax_cpu_enable_async_dispatch", False)  # see the README
    if group.processes > 1:
        jax.distributed.initialize(group.coordinator, group.processes, group.process)

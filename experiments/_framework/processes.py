"""One run on many devices, in one process or in several that work together."""

import dataclasses
import re
import sys
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from unrollgrad.running import positive_int


@dataclasses.dataclass(frozen=True)
class Processes:
    """The position of this process among several; each is started with the same command."""

    processes: int | Literal["auto"] = 1
    """Number of processes that work together. auto: as many as Slurm, Open MPI or a TPU pod
    started."""
    process: int = 0
    """Number of this process, counted from 0; process 0 writes the results."""
    coordinator: str = "localhost:12355"
    """HOST:PORT at which the other processes reach process 0."""


def from_process_0(text: str) -> str:
    """Returns process 0's text in all processes; every process must call it."""
    if jax.process_count() == 1:
        return text
    room = np.zeros(4096, np.uint8)
    found = text.encode()[: room.size]
    room[: len(found)] = list(found)
    shared = multihost_utils.broadcast_one_to_all(room)
    return bytes(np.asarray(shared)).rstrip(b"\0").decode()


def join(group: Processes, devices: int | None) -> None:
    """Joins the other processes and sets the number of devices; call it before any computation.

    A process that does not reach the others waits for five minutes; then ``jax.distributed`` ends
    it.

    Args:
        group: The processes.
        devices: Number of devices in all processes; None: all devices. Only CPUs can be given a
            number.

    Raises:
        ValueError: If the numbers contradict each other, or no cluster is found.
    """
    if group.processes == "auto":
        if dataclasses.replace(group, processes=1) != Processes():
            raise ValueError(
                "`--processes auto` asks the cluster; leave out --process, --coordinator."
            )
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                "`--processes auto` found no Slurm, Open MPI or TPU pod. Say how many there are: "
                "--processes 2 --process 0, and --process 1 in the other."
            ) from error
        return
    count = positive_int("--processes", group.processes)
    if not 0 <= group.process < count:
        raise ValueError(
            f"`--process` counts from 0 to --processes - 1; got --process {group.process} "
            f"--processes {count}."
        )
    if devices is not None:
        if positive_int("--devices", devices) % count:
            raise ValueError(
                f"`--devices` counts all processes' devices, a multiple of --processes; got "
                f"--devices {devices} --processes {count}."
            )
        if devices > count:
            jax.config.update("jax_num_cpu_devices", devices // count)
            jax.config.update("jax_cpu_enable_async_dispatch", False)  # see docs/devices.md
    if count > 1:
        if not re.fullmatch(r".+:[0-9]+", group.coordinator):
            raise ValueError(f"`--coordinator` must be HOST:PORT; got {group.coordinator!r}.")
        if group.process > 0:
            print(f"waiting for process 0 at {group.coordinator}", file=sys.stderr, flush=True)
        jax.distributed.initialize(group.coordinator, count, group.process)

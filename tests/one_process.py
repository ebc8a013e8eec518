"""The measurements of ``test_processes.py``: one process of eight devices, or two of four.

Run as a program with the coordinator, the number of processes, this process's number and a folder,
it joins the other processes and prints its measurements as JSON. With a number of dispatches or
"all" as a fifth argument, it runs ``replay`` in the folder and prints its bits, unless it is killed
after so many dispatches.
"""

import contextlib
import json
import os
import signal
import sys
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax

import unrollgrad as ug
from tests.replayed import bits, spread
from unrollgrad._replay import replay as replaying

WORKERS, STEPS = 16, 5


def measured() -> dict[str, Any]:
    """Results that must not depend on the number of processes."""
    key, mesh = jax.random.key(0), ug.make_worker_mesh()
    problem, theta = ug.problems.influence_balancing(horizon=20)
    out: dict[str, Any] = {"devices": mesh.size}
    for name, estimator, stagger in [
        ("pes", ug.pes(problem, truncation=STEPS, sigma=0.1, num_pairs=2), "lockstep"),
        ("nres", ug.es_single(problem, truncation=STEPS, sigma=0.1), "burn_in"),
    ]:
        many = ug.average(estimator, WORKERS, mesh=mesh, stagger=stagger)
        state, at, numbers = many.init(key, theta), theta, []
        for i in range(4):
            estimate, state = many.estimate(jax.random.fold_in(key, i), at, state)
            at = at - 1e-4 * estimate.grad
            numbers += [float(x) for x in jax.tree.leaves(estimate)]
        out[name] = [*numbers, float(at)]

    # Worker i's loss is i times theta: its gradient is i if it gets its own data.
    own = np.repeat(np.arange(WORKERS, dtype=np.float32)[:, None], STEPS, axis=1)
    weighed = problem._replace(
        step=lambda key, theta, s, t, batch: (problem.step(key, theta, s, t)[0], batch * theta)
    )
    many = ug.average(ug.tbptt(weighed, truncation=STEPS), WORKERS, mesh=mesh)
    estimate, _ = many.estimate(key, theta, many.init(key, theta), data=shared(own))
    assert isinstance(estimate.info, ug.AverageInfo)
    out["data"] = [float(estimate.grad), float(estimate.info.grad_variance)]

    bad = problem._replace(step=lambda key, theta, s, t: (s, theta * np.nan))
    many = ug.average(ug.pes(bad, truncation=STEPS, sigma=0.1), WORKERS, mesh=mesh)
    try:
        many.estimate(key, theta, many.init(key, theta))
    except FloatingPointError as error:
        out["error"] = str(error)[:40]

    out["replay"] = [float(x) for x in replayed(None)[:2]]
    result = fitted()
    out["fit"] = [*result.history["loss"].tolist(), float(result.theta)]
    return out


def replayed(folder, dispatches=None):
    """``replay`` of a state that is spread over all devices; the process ends on the way."""
    problem, theta = spread(64)
    with contextlib.ExitStack() as stack:
        if dispatches is not None:
            stack.enter_context(mock.patch.object(replaying, "progress_bar", killer(dispatches)))
        return ug.replay(problem, jax.random.key(0), theta, steps_per_dispatch=8, folder=folder)


def killer(dispatches):
    """In place of the progress bar: kills this process after so many dispatches."""
    left = iter(range(dispatches))

    @contextlib.contextmanager
    def bar(total, unit):
        yield lambda text, done: os._exit(0) if next(left, None) is None else None

    return bar


def shared(rows):
    """An array over all workers; each process makes its own workers' rows."""
    number = WORKERS // jax.process_count()
    first = number * jax.process_index()
    sharding = jax.sharding.NamedSharding(ug.make_worker_mesh(), jax.P("workers"))
    return jax.make_array_from_process_local_data(sharding, rows[first : first + number])


def fitted(stop_at=None, **checkpoints):
    """``fit`` with streamed data; the last process gets a signal after the step ``stop_at``."""
    problem, theta = ug.problems.influence_balancing(horizon=20)

    def step(key, theta, state, t, batch):
        state, loss = problem.step(key, theta, state, t)
        return state, loss + batch * theta

    def data(i):
        return shared(np.random.default_rng(i).normal(size=(WORKERS, STEPS)).astype(np.float32))

    def callback(i, theta, metrics):
        if i == stop_at and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    pes = ug.pes(problem._replace(step=step), truncation=STEPS, sigma=0.1)
    return ug.fit(
        ug.average(pes, WORKERS, mesh=ug.make_worker_mesh(), stagger="breakstep"),
        theta,
        optax.adam(1e-3),
        num_steps=10,
        key=jax.random.key(0),
        data=data,
        steps_per_dispatch=2,
        callback=callback,
        evaluate=lambda key, theta: {"theta": theta},
        **checkpoints,
    )


def of_several(folder):
    """Results of several processes only: one signal stops all, and the same call resumes."""
    out = measured()
    stopped = fitted(stop_at=4, checkpoint_dir=folder, checkpoint_every=2)
    result = fitted(checkpoint_dir=folder, checkpoint_every=2)
    out["stopped"] = len(stopped.history["loss"])
    out["continued"] = [*result.history["loss"].tolist(), float(result.theta)]
    problem, theta = ug.problems.influence_balancing(horizon=20)
    alone = ug.average(ug.pes(problem, truncation=STEPS, sigma=0.1), WORKERS)
    try:
        ug.fit(
            alone,
            theta,
            optax.adam(1e-3),
            num_steps=2,
            key=jax.random.key(0),
            checkpoint_dir=folder + "-",
        )
    except ValueError as error:
        out["no mesh"] = str(error)
    return out


if __name__ == "__main__":
    address, count, number, path, *dispatches = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 8 // int(count))
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(address, int(count), int(number), initialization_timeout=60)
    if dispatches:
        most = None if dispatches == ["all"] else int(dispatches[0])
        print("bits", bits(replayed(path, most)), flush=True)
    else:
        print(json.dumps(of_several(path)))

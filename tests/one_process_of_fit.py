"""What each process of ``test_processes.py`` runs of ``fit``; it prints what it sees, as JSON."""

import json
import os
import signal
import sys

import jax
import numpy as np
import optax

import unrollgrad as ug


def main(devices, coordinator, num_processes, process_id, folder):
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if int(num_processes) > 1:
        jax.distributed.initialize(
            coordinator, int(num_processes), int(process_id), initialization_timeout=60
        )
    problem, theta = ug.problems.influence_balancing(horizon=20)
    mesh = ug.make_worker_mesh()
    streaming = problem._replace(
        step=lambda key, theta, s, t, batch: (
            (out := problem.step(key, theta, s, t))[0],
            out[1] + batch * theta,
        )
    )
    sharding = jax.sharding.NamedSharding(mesh, jax.P("workers"))
    first, number = int(process_id) * 16 // int(num_processes), 16 // int(num_processes)

    def data(step):
        rows = np.random.default_rng(step).normal(size=(16, 5)).astype(np.float32)
        return jax.make_array_from_process_local_data(sharding, rows[first : first + number])

    def callback(step, theta, metrics):
        if step == stop_at and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    given = {
        "key": jax.random.key(0),
        "data": data,
        "steps_per_dispatch": 2,
        "callback": callback,
        "evaluate": lambda key, theta: {"theta": theta},
    }
    outer, out = optax.adam(1e-3), {}
    pes = ug.pes(streaming, truncation=5, sigma=0.1)
    estimator = ug.average(pes, 16, mesh=mesh, stagger="breakstep")
    stop_at = 4
    result = ug.fit(
        estimator, theta, outer, num_steps=10, checkpoint_dir=folder, checkpoint_every=2, **given
    )
    out["stopped"] = len(result.history["loss"])
    stop_at = None
    result = ug.fit(
        estimator, theta, outer, num_steps=10, checkpoint_dir=folder, checkpoint_every=2, **given
    )
    whole = ug.fit(estimator, theta, outer, num_steps=10, **given)
    out["same"] = [
        bool(np.array_equal(result.theta, whole.theta)),
        bool(np.array_equal(result.history["loss"], whole.history["loss"])),
    ]
    out["loss"] = result.history["loss"].tolist()
    out["theta"] = float(result.theta)
    if int(num_processes) > 1:
        alone = ug.average(ug.pes(problem, truncation=5, sigma=0.1), 16)
        try:
            ug.fit(alone, theta, outer, num_steps=2, key=given["key"], checkpoint_dir=folder + "-")
        except ValueError as error:
            out["error"] = str(error)
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])

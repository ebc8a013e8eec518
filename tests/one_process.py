"""What each process of ``test_processes.py`` runs: the same script, its number as an argument.

Every process prints what it sees, as JSON.
"""

import json
import sys

import jax
import numpy as np

import unrollgrad as ug


def main(devices, coordinator, num_processes, process_id):
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if int(num_processes) > 1:
        jax.distributed.initialize(
            coordinator, int(num_processes), int(process_id), initialization_timeout=60
        )

    key = jax.random.key(0)
    problem, theta = ug.problems.influence_balancing(horizon=20)
    mesh = ug.make_worker_mesh()
    out = {"devices": mesh.size}
    for name, estimator, stagger in [
        ("pes", ug.pes(problem, truncation=5, sigma=0.1, num_pairs=2), "lockstep"),
        ("nres", ug.es_single(problem, truncation=5, sigma=0.1), "burn_in"),
        ("tbptt", ug.tbptt(problem, truncation=5), "breakstep"),
    ]:
        many = ug.average(estimator, 16, mesh=mesh, stagger=stagger)
        state, at, numbers = many.init(key, theta), theta, []
        for i in range(4):
            estimate, state = many.estimate(jax.random.fold_in(key, i), at, state)
            at = at - 1e-4 * estimate.grad
            numbers += [float(x) for x in jax.tree.leaves(estimate)]
        out[name] = [*numbers, float(at)]

    # Every worker's data, made by the process whose devices run it.
    own = np.arange(16.0, dtype=np.float32).reshape(16, 1)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("workers"))
    first = int(process_id) * 16 // int(num_processes)
    local = own[first : first + 16 // int(num_processes)]
    data = jax.make_array_from_process_local_data(sharding, np.repeat(local, 5, axis=1))
    streaming = problem._replace(
        step=lambda key, theta, s, t, batch: (problem.step(key, theta, s, t)[0], batch * theta)
    )
    many = ug.average(ug.tbptt(streaming, truncation=5), 16, mesh=mesh)
    estimate, _ = many.estimate(key, theta, many.init(key, theta), data=data)
    out["data"] = [float(estimate.grad), float(estimate.info.grad_variance)]

    try:
        bad = problem._replace(step=lambda key, theta, s, t: (s, theta * np.nan))
        many = ug.average(ug.pes(bad, truncation=5, sigma=0.1), 16, mesh=mesh)
        many.estimate(key, theta, many.init(key, theta))
    except FloatingPointError as error:
        out["error"] = str(error)[:40]
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Plants mistakes in the library, one at a time, and checks that the tests catch them.

    python tests/mutations.py              # all of them, half a minute each
    python tests/mutations.py sign psum    # those whose names contain one of the words

Every mutation is planted in a copy of the checkout. There the test file that should notice it runs
until its first failure; without a mutation it must pass. A mutation that survives shows a gap in
the tests, and the exit status is 1.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CONTRACT, STATISTICS = "tests/estimators/test_contract.py", "tests/estimators/test_statistics.py"
SAMPLERS = "tests/samplers/test_closed_forms.py"
LIBRARY = Path("unrollgrad")


class Mutation(NamedTuple):
    """One mistake: ``before`` becomes ``after`` in ``file``; ``tests`` should notice."""

    name: str
    file: str
    before: str
    after: str
    tests: str


MUTATIONS = [
    Mutation(
        "wrong sign of a pair",
        "estimators/_pairs.py",
        "return (_plus(both) - _minus(both)) /",
        "return (_minus(both) - _plus(both)) /",
        CONTRACT,
    ),
    Mutation(
        "dropped accumulator",
        "estimators/_persistence.py",
        "now = jax.tree.map(jnp.add, finished, unit)",
        "now = unit",
        STATISTICS,
    ),
    Mutation(
        "1/K missing: losses of a window summed",
        "estimators/_pairs.py",
        "ends = jnp.mean(half_difference(window.losses), axis=1)",
        "ends = jnp.sum(half_difference(window.losses), axis=1)",
        CONTRACT,
    ),
    Mutation(
        "1/K missing in uoro",
        "estimators/uoro.py",
        "grad = jax.tree.map(lambda a: a / segment.num_steps, total)",
        "grad = total",
        CONTRACT,
    ),
    Mutation(
        "key reused by every step",
        "_core/unroll.py",
        "return step(carry, jax.random.fold_in(keys, t), t, batch)",
        "return step(carry, keys, t, batch)",
        CONTRACT,
    ),
    Mutation(
        "noise reused in every period",
        "estimators/_persistence.py",
        "0 if noise_period is None else episode.t // noise_period",
        "0",
        STATISTICS,
    ),
    Mutation(
        "workers share their keys",
        "_workers/average.py",
        "jax.vmap(lambda i: jax.random.fold_in(key, i))(index)",
        "jax.vmap(lambda i: jax.random.fold_in(key, 0 * i))(index)",
        CONTRACT,
    ),
    Mutation(
        "psum where the mean belongs",
        "_workers/mean_and_variance.py",
        "lambda x, g: (x * per_worker).astype(g.dtype), added",
        "lambda x, g: x.astype(g.dtype), added",
        CONTRACT,
    ),
    Mutation(
        "theta replicated before jax.grad (N times the gradient)",
        "estimators/_window.py",
        "key, theta = mesh_axes.over(names, (key, theta))\n        if truncation",
        "if truncation",
        "tests/test_devices.py",
    ),
    Mutation(
        "missing init gradient of backpropagation",
        "_core/unroll.py",
        "arguments.strong_state(problem.init(key, theta), made_by=",
        "arguments.strong_state(problem.init(key, jax.lax.stop_gradient(theta)), made_by=",
        STATISTICS,
    ),
    Mutation(
        "missing init gradient of pairs",
        "estimators/_pairs.py",
        "state = unroll.enter(own, theta, state)",
        "mean = jax.tree.map(lambda x: x.mean(0).astype(x.dtype), thetas)\n"
        "        init = segment.problem.init\n"
        "        fixed = segment.problem._replace(init=lambda key, _: init(key, mean))\n"
        "        here = own._replace(problem=fixed)\n"
        "        state = unroll.enter(here, theta, state)",
        STATISTICS,
    ),
    Mutation(
        "stale state: an episode begins with the last one's end",
        "_core/unroll.py",
        "return jax.lax.while_loop(lambda carry: carry[0], turn, (first, alike(carried)))[1]",
        "return carried",
        CONTRACT,
    ),
    Mutation(
        "missing init gradient of tbptt",
        "estimators/backprop.py",
        "grad = jax.tree.map(jnp.add, grad, added)",
        "pass",
        STATISTICS,
    ),
    Mutation(
        "separate signs for init in uoro",
        "estimators/uoro.py",
        "v = signs(episode, 0, ends)",
        "v = signs(episode, -1, ends)",
        "tests/estimators/test_forward.py",
    ),
    Mutation(
        "mean state of truncated_es advanced with a perturbed theta",
        "estimators/_pairs.py",
        "mean = jax.tree.map(lambda x: x[-1], windows.state)",
        "mean = jax.tree.map(lambda x: x[0], windows.state)",
        "tests/estimators/test_identities.py",
    ),
    Mutation(
        "swapped coordinates of theta's leaves",
        "noise/_laws.py",
        "    def leaf(u):\n        # Full",
        "    def leaf(u):\n        u = u[..., ::-1] if u.ndim > 1 else u\n        # Full",
        CONTRACT,
    ),
    Mutation(
        "swapped tangents of forward mode",
        "estimators/forward.py",
        "rows = jnp.eye(dim, x.size, k=-first, dtype=x.dtype)",
        "rows = jnp.eye(dim, x.size, k=first + x.size - dim, dtype=x.dtype)",
        CONTRACT,
    ),
    Mutation(
        "rounding removed: XLA drops the cast to bfloat16",
        "_core/dtypes.py",
        "return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)",
        "return x",
        CONTRACT,
    ),
    Mutation(
        "cast removed: bfloat16 differences in bfloat16",
        "estimators/_pairs.py",
        "both = both.astype(wide(both.dtype))",
        "both = both.astype(both.dtype)",
        CONTRACT,
    ),
    Mutation(
        "evaluation at the window's start forgotten",
        "estimators/_pairs.py",
        "            if starts is None:\n",
        "            if True:\n",
        STATISTICS,
    ),
    Mutation(
        "bad workers stay in the mean",
        "_workers/average.py",
        'good = finite if workers.nonfinite == "drop" else jnp.ones_like(finite)',
        "good = jnp.ones_like(finite)",
        "tests/test_workers.py",
    ),
    Mutation(
        "variance of one worker in place of the mean's",
        "_workers/mean_and_variance.py",
        "pairs = jnp.float32(count) * (jnp.float32(count) - 1)",
        "pairs = jnp.float32(count) - 1",
        "tests/test_workers.py",
    ),
    Mutation(
        "burn-in one window too long",
        "_workers/staggering.py",
        "return state.episode.t < truncation * _share(index, num_workers, windows)",
        "return state.episode.t <= truncation * _share(index, num_workers, windows)",
        "tests/test_staggering.py",
    ),
    Mutation(
        "one key for all outer steps of fit",
        "_fit/fit.py",
        "lambda i: jax.random.fold_in(key, first + i)",
        "lambda i: jax.random.fold_in(key, first)",
        "tests/test_fit.py",
    ),
    Mutation(
        "directions of dodge forgotten after a period",
        "estimators/forward.py",
        "along.floats, noise.accumulated, evaluated)",
        "along.floats, jax.tree.map(jnp.zeros_like, noise.accumulated), evaluated)",
        "tests/estimators/test_forward.py",
    ),
    Mutation(
        "sign of the implicit part of a hypergradient",
        "implicit/hypergradient.py",
        "lambda b, m: (b - m).astype(b.dtype), direct, along",
        "lambda b, m: (b + m).astype(b.dtype), direct, along",
        "tests/implicit/test_hypergradient.py",
    ),
    Mutation(
        "one leaf's gradient is zero in uoro",
        "estimators/uoro.py",
        "lambda d, r: d.astype(r.dtype) + slope.astype(r.dtype) * r, direct, at.right",
        "lambda d, r: (d.astype(r.dtype) + slope.astype(r.dtype) * r) * (r.ndim > 0), direct,"
        " at.right",
        CONTRACT,
    ),
    Mutation(
        "empty leaves of a state under average",
        "_workers/average.py",
        "x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])",
        "x.reshape(-1, *x.shape[2:])",
        CONTRACT,
    ),
    Mutation(
        "control variate of pes_analytic dropped",
        "estimators/hybrid.py",
        "+ p.astype(e.dtype) - e).astype",
        "+ p.astype(e.dtype)).astype",
        "tests/estimators/test_analytic.py",
    ),
    Mutation(
        "a law of the last steps without its weights",
        "estimators/_retrace.py",
        "return 1 / survival",
        "return 0 * survival + 1",
        SAMPLERS,
    ),
    Mutation(
        "noised copies of DRaFT-LV with too little noise",
        "samplers/truncated.py",
        "c.alpha * fixed.x + c.sigma * z",
        "c.alpha * fixed.x + 0.8 * c.sigma * z",
        SAMPLERS,
    ),
    Mutation(
        "a skip path without the factors of the later steps",
        "samplers/truncated.py",
        "c.data_keep[stop] * c.move * later",
        "c.data_keep[stop] * c.move",
        SAMPLERS,
    ),
    Mutation(
        "adjoint matching without the factor of x in a step",
        "samplers/matching.py",
        "return c.keep * after + back(c.move * after)[0]",
        "return after + back(c.move * after)[0]",
        "tests/samplers/test_adjoint_matching.py",
    ),
    Mutation(
        "adjoint matching without the noise of a step",
        "samplers/matching.py",
        "control + c.noise * one.adjoint",
        "control + one.adjoint",
        "tests/samplers/test_adjoint_matching.py",
    ),
    Mutation(
        "a walk back that differentiates a step at the state after it",
        "estimators/_retrace.py",
        "floats, rebuild = split(before)",
        "floats, rebuild = split(carry.state)",
        "tests/samplers/test_walks.py",
    ),
    Mutation(
        "the inverse of a sampler's step with an iteration too few",
        "samplers/sampling.py",
        "jax.lax.fori_loop(0, iterations, improved",
        "jax.lax.fori_loop(1, iterations, improved",
        "tests/samplers/test_walks.py",
    ),
    Mutation(
        "low-rank noise without 1 / sqrt(rank) in the gradient",
        "noise/_low_rank.py",
        "(weights.astype(a.dtype) / math.sqrt(rank))",
        "weights.astype(a.dtype)",
        "tests/noise/test_low_rank.py",
    ),
    Mutation(
        "factors of earlier periods dropped",
        "estimators/_persistence.py",
        "return jax.lax.fori_loop(0, t // period, earlier, present)",
        "return present",
        "tests/noise/test_low_rank.py",
    ),
]


def plant(mutation: Mutation, copy: Path) -> None:
    """Plants the mistake in the copy."""
    file = copy / LIBRARY / mutation.file
    file.write_text(file.read_text().replace(mutation.before, mutation.after))


def check_places(mutations: list[Mutation]) -> None:
    """Raises ValueError unless the text of each mutation occurs in its file exactly once."""
    for mutation in mutations:
        text = (ROOT / LIBRARY / mutation.file).read_text()
        if text.count(mutation.before) != 1:
            raise ValueError(f"{mutation.name}: {mutation.file} has its text not exactly once")


def run(tests: str, copy: Path) -> tuple[bool, str]:
    """Returns whether the test file passes in the copy, and its first failure.

    Raises:
        RuntimeError: If the tests did not run.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-x", tests]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        return False, "it did not end within ten minutes"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 0:
        return True, ""
    if not failed:
        raise RuntimeError(f"pytest did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return False, failed[0]


def main(words: list[str]) -> int:
    """Plants the chosen mutations and prints the tests that caught them; 1 if one survived."""
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    check_places(chosen)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for file in files:
            if (ROOT / file).is_file() and not file.startswith("experiments/results/"):
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, copy / file)
        for tests in dict.fromkeys(mutation.tests for mutation in chosen):
            passed, failure = run(tests, copy)
            if not passed:
                raise RuntimeError(f"{tests} fails before anything is planted: {failure}")
        for mutation in chosen:
            began = time.monotonic()
            original = (copy / LIBRARY / mutation.file).read_text()
            plant(mutation, copy)
            passed, failure = run(mutation.tests, copy)
            (copy / LIBRARY / mutation.file).write_text(original)
            survived += passed
            seconds = time.monotonic() - began
            print(f"{mutation.name}: {failure or 'SURVIVED'} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutations caught")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

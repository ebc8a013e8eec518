"""Settings of the test runs: eight CPU devices, fast compilation, counted programs."""

import os
from collections import defaultdict
from pathlib import Path

import jax
import pytest

from tests import budget

MAPS = 55_000
"""Above this number of memory maps compiled programs are dropped; Linux allows 65,530."""


def pytest_configure(config):
    """Sets up eight CPU devices and a compile cache, since many tests share programs."""
    # A program is not split for several threads: a sixth fewer CPU seconds, and all cores are busy.
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version_info__ < (0, 11):  # compiling pes takes 1.0 CPU seconds, 2.8 with them
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # else collectives may deadlock
    cache = str(config.cache.mkdir("jax"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # for the processes that tests start
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    _optimize(False)
    budget.register(config)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks all cases of a test but the first one ``same_kind``, unless its cases say which are.

    The newest jax runs the others: what a new version breaks is seldom one case of a test.
    """
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.split("[")[0]].append(item)
    for group in cases.values():
        if not any(item.get_closest_marker("same_kind") for item in group):
            for item in group[1:]:
                item.add_marker("same_kind")


@pytest.fixture(autouse=True, scope="module")
def programs(request):
    """Compiles fast where little is computed, and keeps programs while memory maps allow.

    Tests spend most of their time in XLA, which is much faster without optimizations. Modules that
    compute much are marked ``optimized``. A module's tests run in one process, so that shared
    programs are compiled once.
    """
    _optimize(request.node.get_closest_marker("optimized") is not None)
    yield
    _optimize(False)
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MAPS:
        jax.clear_caches()


def _optimize(how):
    """Sets it here and for the processes that tests start, so that their numbers agree."""
    jax.config.update("jax_disable_most_optimizations", not how)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(not how))


@pytest.fixture
def optimized(programs):
    """Compiles with XLA's optimizations, as a user does."""
    before = not jax.config.read("jax_disable_most_optimizations")
    _optimize(True)
    yield
    _optimize(before)

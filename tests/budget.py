"""Counts the programs that every test compiles, and holds them against a budget.

A compiled program costs 0.05 to several seconds, a further case of a compiled one next to nothing:
so programs are what is counted. Whoever adds a feature says how many its tests add, and changes the
table. The count includes programs that come from the compile cache, which are cheap but not free.
"""

import time
from collections import defaultdict

import jax
import pytest

from tests.helpers import COMPILED

BUDGET: dict[str, int] = {}
"""Programs that the tests of a folder may compile in one default run."""

DEAREST = 10
"""How many tests the summary names."""


def register(config):
    """Counts in this process; the process that prints adds up what the others report."""
    config.pluginmanager.register(_Counter(), "programs-counter")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Summary(), "programs-summary")


class _Counter:
    """Gives every report the programs and CPU seconds since the one before."""

    def __init__(self):
        self.programs, self.last = 0, (0, time.process_time())
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **_):
        self.programs += event == COMPILED

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = (self.programs, time.process_time())
        report.programs, report.cpu = (b - a for a, b in zip(self.last, now, strict=True))
        self.last = now
        return report


class _Summary:
    """Prints the ten dearest tests and every folder's sum; a folder above its budget fails."""

    def __init__(self):
        self.tests = defaultdict(lambda: [0, 0.0])

    def pytest_runtest_logreport(self, report):
        cost = self.tests[report.nodeid]
        cost[0] += report.programs
        cost[1] += report.cpu

    def folders(self):
        """Programs and CPU seconds of every folder."""
        sums = defaultdict(lambda: [0, 0.0])
        for test, cost in self.tests.items():
            parts = test.split("::")[0].split("/")
            folder = "/".join(parts[:2] if len(parts) > 2 else parts[:-1]) or parts[0]
            sums[folder] = [a + b for a, b in zip(sums[folder], cost, strict=True)]
        return sums

    def pytest_sessionfinish(self, session):
        over = [f for f, (programs, _) in self.folders().items() if programs > BUDGET.get(f, 1e9)]
        if over and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        programs, seconds = (sum(cost[i] for cost in self.tests.values()) for i in (0, 1))
        terminalreporter.section(f"{programs} programs compiled, {seconds:.0f} CPU seconds")
        dearest = sorted(self.tests.items(), key=lambda item: -item[1][1])[:DEAREST]
        for test, (programs, seconds) in dearest:
            write(f"{programs:6d} programs {seconds:7.1f} CPU s  {test}")
        for folder, (programs, seconds) in sorted(self.folders().items()):
            allowed = BUDGET.get(folder)
            of = "" if allowed is None else f" of {allowed}"
            over = allowed is not None and programs > allowed
            write(
                f"{folder:28s} {programs:6d}{of} programs {seconds:7.1f} CPU s"
                + (" ABOVE ITS BUDGET (tests/budget.py)" if over else "")
            )

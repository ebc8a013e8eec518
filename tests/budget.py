"""Counts the programs that every test compiles, and holds them against a budget.

Compiling a program costs 0.05 to several seconds, running it again almost nothing; therefore the
programs are counted. Whoever adds a feature states how many programs its tests add, and changes the
table. The count includes programs from the compile cache, which are cheap but not free.
"""

import time
from collections import defaultdict

import jax
import pytest

from tests.helpers import COMPILED

BUDGET = {
    "README.md": 35,
    "docs": 458,
    "tests": 2575,
    "tests/apo": 235,
    "tests/bilevel": 595,
    "tests/diagnostics": 368,
    "tests/estimators": 500,
    "tests/experiments": 145,
    "tests/implicit": 330,
    "tests/learned_optimizers": 190,
    "tests/noise": 90,
    "tests/samplers": 302,
    "tests/stn": 198,
    "unrollgrad": 438,
}
"""The number of programs that the tests of a folder may compile in one default run.

It is the measured number plus a tenth, at least ten: whether a primitive is already compiled
depends on the files that ran before in the same process.
"""

DEAREST = 10
"""The number of tests that the summary names."""


def register(config):
    """Counts in this process; the process that prints the summary adds the others' reports.

    The budget holds for the default run or a part of it; with another ``-m`` the programs are
    counted without comparison.
    """
    config.pluginmanager.register(_Counter(), "programs-counter")
    if not hasattr(config, "workerinput"):
        default = config.option.markexpr == "not experiments"
        config.pluginmanager.register(_Summary(BUDGET if default else None), "programs-summary")


class _Counter:
    """Gives every report the programs and CPU seconds since the previous report."""

    def __init__(self):
        self.programs, self.last = 0, (0, time.process_time())
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int):
        self.programs += event == COMPILED

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = (self.programs, time.process_time())
        report.programs, report.cpu = (b - a for a, b in zip(self.last, now, strict=True))
        self.last = now
        return report


class _Summary:
    """Prints the costliest tests and each folder's sum; exceeding a budget fails the run."""

    def __init__(self, budget):
        self.budget, self.tests = budget, defaultdict(lambda: [0, 0.0])

    def pytest_runtest_logreport(self, report):
        cost = self.tests[report.nodeid]
        # The report for a crashed process was made elsewhere and has no count.
        cost[0] += getattr(report, "programs", 0)
        cost[1] += getattr(report, "cpu", 0.0)

    def folders(self):
        """Programs and CPU seconds of every folder of tests and of the doctests."""
        sums = defaultdict(lambda: [0, 0.0])
        for test, cost in self.tests.items():
            top, *inner = test.split("::")[0].split("/")
            folder = f"{top}/{inner[0]}" if top == "tests" and len(inner) > 1 else top
            sums[folder] = [a + b for a, b in zip(sums[folder], cost, strict=True)]
        return sums

    def above(self, folder, programs):
        """Whether the folder exceeds its budget; a folder without a row in the table does."""
        return self.budget is not None and programs > self.budget.get(folder, 0)

    def pytest_sessionfinish(self, session):
        above = any(self.above(folder, cost[0]) for folder, cost in self.folders().items())
        if above and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        programs, seconds = (sum(cost[i] for cost in self.tests.values()) for i in (0, 1))
        terminalreporter.section(f"{programs} programs compiled, {seconds:.0f} CPU seconds")
        dearest = sorted(self.tests.items(), key=lambda item: -item[1][1])[:DEAREST]
        for test, (programs, seconds) in dearest:
            write(f"{programs:6d} programs {seconds:7.1f} CPU s  {test}")
        for folder, (programs, seconds) in sorted(self.folders().items()):
            allowed = "" if self.budget is None else f" of {self.budget.get(folder, 0)}"
            line = f"{folder:26s} {programs:6d}{allowed} programs {seconds:7.1f} CPU s"
            above = self.above(folder, programs)
            write(line + (" ABOVE ITS BUDGET (tests/budget.py)" if above else ""))

"""How the folder of a run is written and read."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments._framework.commands import ROOT
from unrollgrad.diagnostics.report import environment, metrics, write_json

__all__ = ["Record", "Summary", "compile_seconds", "new_folder", "read", "write_json", "writer"]

USED = ("unrollgrad", "experiments", ":!experiments/results", ":!experiments/RESULTS.md")
"""What a run may read of the repository: all code and trained weights, but no earlier record."""


class Record(NamedTuple):
    """One line of ``metrics.csv``.

    Attributes:
        seed: The seed of the run.
        step: The step along the run; None if the number does not belong to a step.
        labels: The labels of its series, such as the estimator.
        metric: The name of the number.
        value: The number.
    """

    seed: int
    step: int | None
    labels: dict[str, str]
    metric: str
    value: float


class Summary(NamedTuple):
    """The content of ``summary.json`` and ``config.json``.

    Attributes:
        results: A dict for each series with its labels, ``metric``, and ``mean``, ``se`` and ``n``
            over the seeds, at the last step. The mean is NaN if a seed's number is not finite;
            ``se`` is None for one seed.
        about: All other entries: experiment, config, status, seconds, environment.
    """

    results: list[dict[str, Any]]
    about: dict[str, Any]

    def find(self, metric: str, **labels: str) -> dict[str, Any] | None:
        """The result with this metric and these labels, or None."""
        for r in self.results:
            if r["metric"] == metric and all(r.get(k) == v for k, v in labels.items()):
                return r
        return None


def new_folder(out: Path, name: str) -> Path:
    """Makes the folder ``out/name-DATE-TIME``.

    Raises:
        OSError: If the folder cannot be made.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(100):
        folder = out / f"{name}-{stamp}{f'-{attempt}' if attempt else ''}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise
        else:
            return folder
    raise FileExistsError(f"100 folders named {folder}")


def record(folder: Path, out: Path, title: str) -> Path:
    """Copies a finished run to ``out/title``, with a compressed table, and replaces the old record.

    Raises:
        ValueError: If the run is not complete, or was not made by the code of a commit.
    """
    about = read_summary(folder).about
    status, revision = about["status"], about["environment"]["git_revision"]
    if status != "complete":
        raise ValueError(f"{folder} is not complete ({status}); only complete runs are recorded.")
    if revision is None or revision.endswith("+"):
        where = "outside a git repository" if revision is None else "by code of no single commit"
        raise ValueError(
            f"{folder} was made {where} (git_revision {revision}), so nobody can repeat it. Commit "
            f"every file in unrollgrad/ and experiments/, and run it again: {about['command']}"
        )
    recorded = out / title
    if recorded.resolve() == folder.resolve():
        raise ValueError(f"{folder} is recorded already. Pass the folder of a run.")
    shutil.rmtree(recorded, ignore_errors=True)
    kept = shutil.ignore_patterns("metrics.csv", "checkpoints", "theta-*.npz")
    shutil.copytree(folder, recorded, ignore=kept)
    if (table := folder / "metrics.csv").is_file():
        packed = gzip.compress(table.read_bytes(), mtime=0)  # the same bytes for the same table
        (recorded / "metrics.csv.gz").write_bytes(packed)
    return recorded


def remove(folder: Path) -> None:
    """Removes a run's folder."""
    shutil.rmtree(folder)


@contextlib.contextmanager
def writer(
    folder: Path, labels: tuple[str, ...]
) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """Yields ``write(seed, numbers)``, which appends to ``metrics.csv`` and flushes.

    Lines that a resumed run wrote before are not written again.
    """
    path = folder / "metrics.csv"
    header = ["seed", "step", *labels, "metric", "value"]
    there = path.read_bytes() if path.exists() else b""
    there = there[: there.rfind(b"\n") + 1]  # a run that was killed may leave half a line
    if not there:
        there = (",".join(header) + "\r\n").encode()
    path.write_bytes(there)
    known = {tuple(line[:-1]) for line in csv.reader(io.StringIO(there.decode(), newline=""))}
    with open(path, "a", newline="") as file:

        def write(seed: int, numbers: dict[str, Any]) -> None:
            step = numbers.get("step", "")
            series = [numbers[label] for label in labels]
            rest = {k: v for k, v in numbers.items() if k not in ("step", *labels)}
            text = io.StringIO()  # written at once: an interruption leaves whole groups of lines
            lines = csv.writer(text)
            for metric, value in metrics(rest).items():
                line = [*map(str, [seed, step, *series]), metric]
                if tuple(line) not in known:
                    lines.writerow([*line, float(value)])
            file.write(text.getvalue())
            file.flush()

        yield write


def read(folder: Path) -> list[Record]:
    """Reads ``metrics.csv``, or ``metrics.csv.gz`` of a recorded run.

    Raises:
        FileNotFoundError: If the folder has neither.
    """
    path, packed = folder / "metrics.csv", folder / "metrics.csv.gz"
    if not path.is_file() and not packed.is_file():
        raise FileNotFoundError(f"{folder} is not a folder of results: it has no metrics.csv.")
    opened = open(path, newline="") if path.is_file() else gzip.open(packed, "rt", newline="")
    with opened as file:
        return [
            Record(
                seed=int(line.pop("seed")),
                step=int(step) if (step := line.pop("step")) else None,
                metric=line.pop("metric"),
                value=float(line.pop("value")),
                labels=line,
            )
            for line in csv.DictReader(file)
        ]


def read_json(path: Path) -> dict[str, Any]:
    """Reads one of the folder's JSON files.

    Raises:
        ValueError: If the file is damaged; the message names it.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


class Outcome(NamedTuple):
    """How a run ended, and what it took.

    Attributes:
        status: "complete", "interrupted", or "failed: " with the error.
        seconds: The run's duration.
        compile_seconds: The part of it that was spent on compilation.
        revision: The commit of the code when the run began; see ``git_revision``.
        command: The command that repeats the run.
    """

    status: str
    seconds: float
    compile_seconds: float
    revision: str | None
    command: str


def write_summary(
    folder: Path, config: dict[str, Any], records: list[Record], outcome: Outcome
) -> None:
    """Writes ``summary.json``."""
    about = {
        "experiment": config["experiment"],
        "scale": config["scale"],
        "seeds": list(config["seeds"]),
        "status": outcome.status,
        "command": outcome.command,
        "seconds": round(outcome.seconds, 1),
        "compile_seconds": round(outcome.compile_seconds, 1),
        "run_seconds": round(outcome.seconds - outcome.compile_seconds, 1),
        "environment": {**environment(), "git_revision": outcome.revision},
    }
    write_json(folder / "summary.json", {**about, "results": summarise(records)})


def read_summary(folder: Path) -> Summary:
    """Reads ``summary.json`` and ``config.json``."""
    about = read_json(folder / "summary.json")
    about["config"] = read_json(folder / "config.json")
    return Summary(from_json(about.pop("results")), about)


def from_json(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results as numbers: a null, which stands for a number that is not finite, becomes NaN.

    A standard error of one seed stays None.
    """
    return [
        {
            **r,
            "mean": math.nan if r["mean"] is None else r["mean"],
            "se": math.nan if r["se"] is None and r["n"] > 1 else r["se"],
        }
        for r in found
    ]


def summarise(records: list[Record]) -> list[dict[str, Any]]:
    """The mean, standard error (None for one seed) and n over seeds, at each series' last step."""

    def series(record):
        return (*record.labels.values(), record.metric)

    out = []
    order = {key: i for i, key in enumerate(dict.fromkeys(map(series, records)))}
    records = sorted(records, key=lambda r: order[series(r)])
    for _, group in itertools.groupby(records, key=series):
        group = list(group)
        last = {r.seed: r for r in sorted(group, key=lambda r: r.step or 0)}
        values = np.array([r.value for r in last.values()])
        n = len(values)
        with np.errstate(invalid="ignore"):  # the SNR without spread is infinite
            equal = n > 1 and bool((values == values[0]).all())  # std would leave rounding errors
            se = None if n < 2 else 0.0 if equal else float(values.std(ddof=1) / math.sqrt(n))
            mean = float(values.mean())
        here = {**group[0].labels, "metric": group[0].metric}
        out.append({**here, "mean": mean, "se": se, "n": n})
    return out


def git_revision() -> str | None:
    """The commit, with "+" if code differs from it or is not in it; None outside a repository."""

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=all", "--", *USED)
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def resumed_revision(folder: Path) -> str | None:
    """``git_revision``, with "+" also if the run in the folder began with another one."""
    revision = git_revision()
    if not (folder / "summary.json").is_file():
        return revision
    before = read_json(folder / "summary.json")["environment"]["git_revision"]
    return revision if before == revision or revision is None else revision.rstrip("+") + "+"


_compiling = 0.0


def compile_seconds() -> float:
    """Seconds that this process has spent on lowering and compilation so far, without tracing."""
    return _compiling


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _compiling
    # Traces are nested, so their sum would count some of the time twice.
    if event.startswith("/jax/core/compile/") and "trace" not in event:
        _compiling += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)

"""``report``: RESULTS.md from recorded summaries."""

import os
from collections.abc import Mapping
from pathlib import Path

from experiments._framework import results
from experiments._framework.experiment import Claim, Experiment
from experiments._framework.results import Summary

HEAD = """# Results

Written by `python -m experiments report` from the folders beside it; do not edit. A number is the
mean over seeds ± its standard error (that of a bias or variance is over the samples of each seed's
run). **does not reproduce** marks what did not come out here.
"""

MARKS = {True: "yes", False: "**does not reproduce**", None: "cannot tell"}


def write(experiments: Mapping[str, Experiment], folder: Path, path: Path) -> Path:
    """Writes ``path`` from every folder of results in ``folder``.

    Raises:
        FileNotFoundError: If there are none.
    """
    found = sorted(p.parent for p in folder.glob("*/summary.json"))
    if not found:
        raise FileNotFoundError(
            f"no results in {folder}: run an experiment with --out {folder} first."
        )
    parts = [HEAD]
    for one in found:
        try:
            summary = results.read_summary(one)
        except ValueError as error:
            raise ValueError(f"{one}/summary.json cannot be read: {error}.") from error
        experiment = experiments.get(summary.about["experiment"])
        picture = Path(os.path.relpath(one, path.parent)).as_posix()
        parts.append(section(one.name, summary, experiment, picture))
    path.write_text("\n".join(parts))
    return path


def section(name: str, summary: Summary, experiment: Experiment | None, picture: str) -> str:
    """One experiment's part of the report."""
    about = summary.about
    environment = about["environment"]
    revision = (environment.get("git_revision") or "unknown")[:10]
    lines = [f"## {name}", ""]
    if about["status"] != "complete":
        lines += [f"**Not complete: {about['status']}.**", ""]
    claims: list[Claim] = [] if experiment is None else experiment.claims(summary)
    if claims:
        lines += ["| claim | source | ours | holds |", "|---|---|---|---|"]
        lines += [_row(c.says, c.source, c.ours, MARKS[c.holds]) for c in claims]
        lines.append("")
    seeds = ", ".join(map(str, about["seeds"]))
    lines += [
        f"Seeds {seeds}; scale {about['scale']}; {environment['device']} × "
        f"{environment['num_devices']}; {about['seconds'] / 60:.1f} minutes, "
        f"{about['compile_seconds'] / 60:.1f} of them compiling; jax {environment['jax']}, "
        f"unrollgrad {environment['unrollgrad']}, revision {revision}.",
        "",
        f"    {about['command']}",
        "",
        f"![{name}]({picture}/figure.png)",
        "",
    ]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

"""Where a record comes from: the command that repeats it, and the commit of its code."""

import dataclasses
import json
import shlex
import subprocess
import typing
from pathlib import Path

import pytest

from experiments import __main__ as cli
from experiments._framework import commands, report, results
from experiments._framework.commands import PLACES, command_line

RECORDS = sorted(path.parent for path in (results.ROOT / "experiments/results").glob("*/*.json"))
RECORDS = list(dict.fromkeys(RECORDS))
EVERY_EXPERIMENT = pytest.mark.parametrize("name", cli.EXPERIMENTS)


@pytest.fixture
def parsed(monkeypatch):
    """A function that returns what a command line would run, an experiment and its settings."""
    monkeypatch.setattr(cli, "keep_programs", lambda: None)
    monkeypatch.setattr(cli, "join", lambda *arguments: None)
    monkeypatch.setattr(cli.framework, "execute", lambda *given: found.append(given))
    found = []

    def parse(command: str):
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "experiments"]
        cli.main(words[3:])
        return found.pop()

    return parse


def other(value):
    """Another value of the same type; None and words have no other."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, Path):
        return Path("a folder") / "file"
    if isinstance(value, tuple):
        return tuple(map(other, value))
    return value


@EVERY_EXPERIMENT
def test_a_command_repeats_all_settings(name, parsed):
    """At every scale, with every setting changed and with every list emptied."""
    experiment = cli.EXPERIMENTS[name]
    types = typing.get_type_hints(experiment.settings)
    for usual in experiment.scales.values():
        names = {f.name for f in dataclasses.fields(usual)} - {"scale", *PLACES}
        values = {key: getattr(usual, key) for key in sorted(names)}
        changed = {key: other(value) for key, value in values.items()}
        empty = {k: () for k in names if typing.get_args(types[k])[1:] == (...,)}
        assert {k: v for k, v in changed.items() if v != values[k]}
        for settings in (usual, *(dataclasses.replace(usual, **c) for c in (changed, empty))):
            assert parsed(command_line(experiment, settings)) == (experiment, settings)


def test_a_command_says_what_differs():
    variance = cli.EXPERIMENTS["variance"]
    scales = variance.scales
    for settings, flags in [
        (scales["cpu"], ""),
        (dataclasses.replace(scales["cpu"], out=Path("elsewhere")), ""),
        (scales["smoke"], " --scale smoke"),
        (dataclasses.replace(scales["cpu"], seeds=(3, 5), sigma=0.5), " --seeds 3 5 --sigma 0.5"),
    ]:
        found = command_line(variance, settings)
        assert sorted(found.split()) == sorted(f"python -m experiments variance{flags}".split())


def test_a_file_of_the_repository_has_the_same_name_in_every_clone():
    assert commands.from_root(results.ROOT / "experiments" / "a.npz") == "experiments/a.npz"
    assert commands.from_root(Path("/elsewhere/a.npz")) == "/elsewhere/a.npz"
    assert commands.from_root(Path("a.npz")) == "a.npz"


def test_a_command_of_several_processes(monkeypatch):
    monkeypatch.setattr(commands.jax, "process_count", lambda: 2)
    variance = cli.EXPERIMENTS["variance"]
    found = command_line(variance, variance.scales["cpu"])
    assert found == "python -m experiments variance --processes 2 --process 0"


@pytest.mark.parametrize("folder", RECORDS, ids=[folder.name for folder in RECORDS])
def test_the_command_of_a_record_has_its_settings(folder, parsed):
    """It has them with the present defaults, or the report says that they have changed."""
    summary = results.read_summary(folder)
    config = summary.about["config"]
    known = cli.EXPERIMENTS[config["experiment"]]
    command = commands.recorded_command(known, config)
    if command is None:
        fields = {field.name for field in dataclasses.fields(known.settings)}
        assert fields - {"resume"} != set(config) - {"experiment"}
        return
    experiment, settings = parsed(command)
    assert experiment == known
    found = dataclasses.asdict(experiment.fill(settings))
    if isinstance(found.get("devices"), int):  # all that the machine has
        found["devices"] = config["devices"]
    kept = set(config) - {"experiment", *PLACES}
    assert {k: commands.as_json(found[k]) for k in kept} == {k: config[k] for k in kept}


def test_a_record_with_other_settings_has_no_command():
    variance = cli.EXPERIMENTS["variance"]
    config = {k: commands.as_json(v) for k, v in dataclasses.asdict(variance.scales["cpu"]).items()}
    assert commands.recorded_command(variance, config) == "python -m experiments variance"
    assert commands.recorded_command(variance, {**config, "gone": 1}) is None
    del config["sigma"]
    assert commands.recorded_command(variance, config) is None


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a committed file of code, a record and a page; and git in it."""
    monkeypatch.setattr(results, "ROOT", tmp_path)

    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    write(tmp_path)
    git("init")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=b", "commit", "-m", "first")
    return tmp_path


def write(root, text="1", *names):
    for name in names or ("unrollgrad/a.py", "experiments/results/b/c.json", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("unrollgrad/a.py", True),  # changed
        ("experiments/new.py", True),  # in no commit
        ("experiments/results/b/c.json", False),
        ("experiments/results/new/c.json", False),
        ("experiments/RESULTS.md", False),
        ("README.md", False),
    ],
)
def test_a_revision_says_whether_code_differs(name, differs, repository):
    committed = results.git_revision()
    assert committed is not None
    assert len(committed) == 40
    write(repository, "2", name)
    assert results.git_revision() == committed + ("+" if differs else "")


@pytest.mark.parametrize(("before", "after"), [("a", "a"), ("b", "a+"), ("a+", "a+"), (None, "a+")])
def test_a_run_that_goes_on_with_other_code(before, after, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "git_revision", lambda: "a")
    assert results.resumed_revision(tmp_path) == "a"
    about = {"environment": {"git_revision": before}}
    (tmp_path / "summary.json").write_text(json.dumps(about))
    assert results.resumed_revision(tmp_path) == after


def test_no_revision_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.git_revision() is None


@pytest.mark.parametrize(
    ("revision", "message"),
    [("a" * 40 + "+", "by code of no single commit"), (None, "outside a git repository")],
)
def test_only_committed_code_is_recorded(revision, message, tmp_path):
    folder = tmp_path / "toy-20261129-120000"
    folder.mkdir()
    about = {
        "status": "complete",
        "command": "python -m experiments toy --seeds 3",
        "environment": {"git_revision": revision},
        "results": [],
    }
    for name, content in {"summary": about, "config": {}}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        results.record(folder, tmp_path / "records", "toy")
    assert str(error.value).endswith("run it again: python -m experiments toy --seeds 3")
    assert not (tmp_path / "records").exists()


def test_the_report_says_that_code_differed():
    differs = "revision 0123456789+ (the code differed from the commit)"
    assert report.revision("0123456789abcdef+") == differs
    assert report.revision("0123456789abcdef") == "revision 0123456789"
    assert report.revision(None) == "revision unknown"

"""Running experiments, the files that they write, and reading these again."""

import dataclasses
import io
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments import __main__ as cli
from experiments._framework import experiment as framework
from experiments._framework import report, results
from experiments._framework.experiment import SCALES, Claim, Experiment
from experiments._framework.settings import CommonSettings
from tests.helpers import present


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """A toy.

    Its settings decide how it fails.
    """

    seeds: tuple[int, ...] = (3, 4)
    """The seeds."""
    fail: str = ""
    """The kind of failure, and its seed."""


def run(settings, seed, folder, write, progress):
    if settings.fail == f"at once {seed}":
        raise KeyboardInterrupt
    for name in ["a", "b"]:
        for step in [0, 10]:
            progress(name, step / 20)
            write({"estimator": name, "step": step, "loss": seed + step, "by_u": {1: 0.5}})
        if settings.fail == f"interrupt {seed}":
            raise KeyboardInterrupt
        if settings.fail == f"error {seed}":
            raise FloatingPointError("nan in b")


def draw(records, config):
    figure = Figure()
    figure.subplots().plot([r.value for r in records])
    return figure


def claims(summary):
    loss = summary.find("loss", estimator="a")["mean"]
    return [
        Claim("a falls", "A 2020", f"{loss}", loss < 0),
        Claim("a is 13.5", "B 2021", f"{loss}", loss == 13.5),
        Claim("who knows", "C 2022", "|g| = ?", None),
    ]


TOY = Experiment(
    name="toy",
    about="A toy.",
    settings=Settings,
    scales={"smoke": Settings(scale="smoke", seeds=(0,)), "cpu": Settings(), "paper": Settings()},
    labels=("estimator",),
    fill=lambda settings: settings,
    run=run,
    draw=draw,
    show=lambda records: print(f"{len(records)} records"),
    claims=claims,
    would_change="The toy does not fall.",
    title=lambda settings: "toy",
)


def only_folder(path):
    (folder,) = path.iterdir()
    return folder


def test_a_run_leaves_everything(tmp_path, capsys):
    folder = present(framework.execute(TOY, Settings(out=tmp_path)))
    assert folder == only_folder(tmp_path)
    files = ["config.json", "figure.png", "metrics.csv", "summary.json"]
    assert sorted(p.name for p in folder.iterdir()) == files
    assert str(folder) in capsys.readouterr().out
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert lines[:3] == [
        "seed,step,estimator,metric,value",
        "3,0,a,loss,3.0",
        "3,0,a,by_u[1],0.5",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["experiment"] == "toy"
    assert config["seeds"] == [3, 4]
    summary = results.read_summary(folder)
    assert summary.about["status"] == "complete"
    assert summary.about["seconds"] >= summary.about["run_seconds"] >= 0
    for recorded in ["jax", "optax", "device", "xla_flags", "git_revision", "num_devices"]:
        assert recorded in summary.about["environment"]
    # The mean over seeds at the last step: 13 and 14.
    loss = summary.find("loss", estimator="b")
    assert (loss["mean"], loss["n"]) == (13.5, 2)
    assert loss["se"] == pytest.approx(np.std([13, 14], ddof=1) / np.sqrt(2))
    assert summary.find("loss", estimator="c") is None


def test_no_work_is_a_message_and_no_folder(tmp_path):
    idle = TOY._replace(run=lambda settings, seed, folder, write, progress: None)
    with pytest.raises(ValueError, match="nothing was computed"):
        framework.execute(idle, Settings(out=tmp_path))
    assert not list(tmp_path.iterdir())


def test_equal_numbers_have_no_standard_error():
    """The standard deviation of three times 0.1, as numpy computes it, is not 0."""
    here = [results.Record(seed, None, {}, "loss", 0.1) for seed in range(3)]
    (found,) = results.summarise(here)
    assert np.std([0.1] * 3) > 0
    assert found["se"] == 0


def test_one_seed_has_no_standard_error(tmp_path):
    folder = present(framework.execute(TOY, Settings(seeds=(0,), out=tmp_path)))
    assert results.read_summary(folder).find("loss", estimator="a")["se"] is None


@pytest.mark.parametrize(
    ("fail", "error", "status"),
    [
        ("interrupt 4", KeyboardInterrupt, "interrupted"),
        ("error 4", FloatingPointError, "failed: nan in b"),
    ],
)
def test_what_was_computed_is_kept(fail, error, status, tmp_path, capsys):
    with pytest.raises(error):
        framework.execute(TOY, Settings(fail=fail, out=tmp_path))
    folder = only_folder(tmp_path)
    assert str(folder) in capsys.readouterr().err
    records = results.read(folder)
    assert len(records) == 8 + 4  # both estimators of seed 3, one of seed 4
    summary = results.read_summary(folder)
    assert summary.about["status"] == status
    assert summary.find("loss", estimator="a")["n"] == 2
    assert summary.find("loss", estimator="b")["n"] == 1
    assert (folder / "figure.png").exists()


def test_nothing_computed_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        framework.execute(TOY, Settings(fail="at once 3", out=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_that_are_no_list_of_different_numbers(seeds, tmp_path):
    with pytest.raises(ValueError, match="`seeds` must be different numbers"):
        framework.execute(TOY, Settings(seeds=seeds, out=tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_picture_is_drawn_again_from_the_csv(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cli.EXPERIMENTS, "toy", TOY)
    folder = present(framework.execute(TOY, Settings(out=tmp_path)))
    picture = (folder / "figure.png").read_bytes()
    (folder / "figure.png").unlink()
    cli.main(["plot", str(folder)])
    assert (folder / "figure.png").read_bytes() == picture
    lines = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text("\n".join(lines[:3]))
    cli.main(["plot", str(folder)])
    assert (folder / "figure.png").read_bytes() != picture
    with pytest.raises(FileNotFoundError, match="is not a folder of results"):
        cli.main(["plot", str(tmp_path)])
    monkeypatch.delitem(cli.EXPERIMENTS, "toy")
    with pytest.raises(ValueError, match="an experiment that is not known here: 'toy'"):
        cli.main(["plot", str(folder)])


def test_a_record_replaces_the_one_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "RECORDED", tmp_path / "records")
    monkeypatch.setattr(results, "git_revision", lambda: "a" * 40)
    for seeds in [(3, 4), (5,)]:
        folder = present(framework.execute(TOY, Settings(seeds=seeds, out=tmp_path / "results")))
        cli.main(["record", str(folder), "--variant", "again"])
        kept = only_folder(tmp_path / "records")
        assert kept.name == "toy-again"
        names = ["config.json", "figure.png", "metrics.csv.gz", "summary.json"]
        assert sorted(p.name for p in kept.iterdir()) == names
        assert results.read(kept) == results.read(folder)
        assert {r.seed for r in results.read(kept)} == set(seeds)
    picture = (kept / "figure.png").read_bytes()
    (kept / "figure.png").unlink()
    framework.redraw(TOY, kept)
    assert (kept / "figure.png").read_bytes() == picture
    with pytest.raises(ValueError, match="is recorded already"):
        cli.main(["record", str(kept)])
    with pytest.raises(KeyboardInterrupt):
        framework.execute(TOY, Settings(fail="interrupt 4", out=tmp_path / "broken"))
    with pytest.raises(ValueError, match=r"is not complete \(interrupted\)"):
        cli.main(["record", str(only_folder(tmp_path / "broken"))])
    assert only_folder(tmp_path / "records") == kept


def test_a_large_picture_is_made_small():
    figure = Figure(figsize=(9, 6))
    noise = np.random.default_rng(0).normal(size=(100, 50))
    for axes in figure.subplots(2, 3).flat:
        axes.plot(noise)
    small, full = framework.small_picture(figure), io.BytesIO()
    figure.savefig(full, dpi=150)
    assert small.startswith(b"\x89PNG")
    assert len(small) < len(full.getvalue()) / 2
    assert Image.open(io.BytesIO(small)).width < 9 * 150
    simple = Figure()
    simple.subplots().plot([1, 2])
    assert len(framework.small_picture(simple)) < framework.MOST_BYTES


@pytest.mark.parametrize(
    ("sources", "holds", "word"),
    [
        ("AB", (True, True), "reproduced"),
        ("AB", (True, None), "reproduced; 1 cannot be told"),
        ("AB", (True, False), "reproduced in part (1 of 2)"),
        ("AB", (False, None), "**not reproduced**; 1 cannot be told"),
        ("ABCD", (True, None, None, False), "reproduced in part (1 of 2); 2 cannot be told"),
        ("AB", (None, None), "cannot tell"),
        (["our target"] * 2, (True, True), "own target, met"),
        (["our target"] * 2, (False, False), "**own target, not met**"),
        ([], (), "measured, no claim"),
    ],
)
def test_a_verdict_is_all_claims_in_a_word(sources, holds, word):
    claims_of = [Claim("", source, "", held) for source, held in zip(sources, holds, strict=True)]
    assert report.verdict(claims_of) == word


def test_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cli.TOPICS, "toys", {"toy": TOY})
    recorded, out = tmp_path / "results", tmp_path / "RESULTS.md"
    with pytest.raises(FileNotFoundError, match="no results in"):
        cli.main(["report", "--folder", str(recorded), "--out", str(out), "--pages"])
    done = present(framework.execute(TOY, Settings(out=recorded)))
    with pytest.raises(KeyboardInterrupt):
        framework.execute(TOY, Settings(fail="interrupt 4", out=recorded))
    cli.main(["report", "--folder", str(recorded), "--out", str(out), "--pages"])
    text = out.read_text()
    assert text.count("## toy-") == 2
    verdict = "reproduced in part (1 of 2); 1 cannot be told"
    row = f"| [{done.name}](#{done.name}) | A 2020; B 2021; C 2022 | {verdict} |"
    head = "| experiment | source | verdict | what it shows | what would change our mind |"
    lines = "|---|---|---|---|---|"
    assert f"## toys\n\n{head}\n{lines}\n{row} A toy. | The toy does not fall. |" in text
    assert "| a falls | A 2020 | 13.5 | **does not reproduce** |" in text
    assert "| a is 13.5 | B 2021 | 13.5 | yes |" in text
    assert r"| who knows | C 2022 | \|g\| = ? | cannot tell |" in text
    assert "**Not complete: interrupted.**" in text
    assert "Seeds 3, 4; scale cpu; cpu × 8;" in text
    assert "minutes" in text
    assert "revision" in text
    assert f"(results/{done.name}/figure.png)" in text
    assert "    python -m experiments toy\n" in text
    (done / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=f"{done.name}/summary.json cannot be read"):
        cli.main(["report", "--folder", str(recorded), "--out", str(out), "--pages"])


def test_the_scale_decides_the_defaults():
    assert cli.scale(["variance"]) == "cpu"
    assert cli.scale(["variance", "--sigma", "1", "--scale", "smoke"]) == "smoke"
    assert cli.scale(["variance", "--scale=paper"]) == "paper"
    assert cli.scale(["variance", "--scale", "smoke", "--scale", "paper"]) == "paper"
    assert cli.scale(["variance", "--scale", "huge"]) == "cpu"  # the parser refuses it later
    for experiment in cli.EXPERIMENTS.values():
        assert tuple(experiment.scales) == SCALES
        for scale, settings in experiment.scales.items():
            assert settings.scale == scale
            assert settings.seeds


def test_list_names_everything(capsys):
    cli.main(["list"])
    out = capsys.readouterr().out
    for name in [*cli.EXPERIMENTS, *cli.PROBLEMS]:
        assert name in out


@pytest.mark.parametrize(
    ("asked", "meant"), [("varianc", "variance"), ("copy-tsk", "copy_task"), ("recrod", "record")]
)
def test_a_command_that_is_misspelled(asked, meant):
    with pytest.raises(ValueError, match=rf"no command '{asked.replace('-', '_')}'.*{meant}"):
        cli.main([asked])


def test_the_help_names_every_command(capsys):
    cli.main([])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in (*cli.EXPERIMENTS, "record", "report"))
    with pytest.raises(SystemExit):
        cli.main(["variance", "--help"])
    shown = capsys.readouterr().out
    assert "usage: python -m experiments variance " in shown
    assert shown.count("\n") < 100


def test_lists_with_commas(capsys):
    with pytest.raises(SystemExit):
        cli.main(["variance", "--estimators", "pes,tbpt"])
    assert "'tbpt'" in capsys.readouterr().err

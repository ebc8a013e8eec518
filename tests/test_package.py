"""The package for a newcomer: imports, the README, the public names."""

import json
import subprocess
import sys
from pathlib import Path

import unrollgrad as ug
from tests import stored
from tests.helpers import present
from unrollgrad.estimators import REGISTRY

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "experiments" / "learned" / "trained"
HEADER = "| estimator | unbiased for | variance | inner steps per call | memory | paper |"


def table():
    """The README's table of estimators, from the registry."""
    rows = [
        f"| `{name}` | {row.unbiased_for} | {row.variance} | {row.time} | {row.memory} "
        f"| {row.paper} |"
        for name, row in REGISTRY.items()
    ]
    return "\n".join([HEADER, "|---|---|---|---|---|---|", *rows])


def test_the_readme_has_the_table_of_estimators():
    assert table() in (ROOT / "README.md").read_text(), f"put this into README.md:\n{table()}"


def test_without_the_extras():
    """The import needs no extra, and the trained optimizers work with the core alone."""
    files = sorted(TRAINED.glob("*.npz"))
    command = [sys.executable, "-m", "tests.without_extras", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["imported"] == []
    assert len(files) == 2
    for file, losses in zip(files, found["losses"], strict=True):
        assert losses[-1] < 0.3 * losses[0]
        stored.expect(f"trained {file.stem}", {str(20 * i): x for i, x in enumerate(losses)})


def test_public_names_exist_and_are_documented():
    for name in ug.__all__:
        assert (getattr(ug, name).__doc__ or name == "REGISTRY") is not None
    for row in REGISTRY.values():
        doc = present(row.factory.__doc__)
        for part in ["Args:", "Returns:", "Raises:", "Example:", ">>>", "References:", "Time:"]:
            assert part in doc, (row.factory.__name__, part)
    assert (ROOT / "unrollgrad" / "py.typed").exists()


def test_nothing_in_the_library_imports_the_experiments():
    for path in (ROOT / "unrollgrad").rglob("*.py"):
        assert "import experiments" not in path.read_text()
        assert "from experiments" not in path.read_text()

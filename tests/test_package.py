"""The package as a newcomer meets it: imports, the README, the public names."""

import subprocess
import sys
from pathlib import Path

import unrollgrad as ug
from unrollgrad.estimators import REGISTRY

ROOT = Path(__file__).parents[1]
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


def test_import_pulls_in_no_extra():
    code = (
        "import sys, unrollgrad; "
        "extras = ['matplotlib', 'rich', 'tyro', 'sklearn', 'flax', 'orbax', 'lineax']; "
        "print([m for m in extras if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    for name in ug.__all__:
        assert (getattr(ug, name).__doc__ or name == "REGISTRY") is not None
    for row in REGISTRY.values():
        doc = row.factory.__doc__
        for part in ["Args:", "Returns:", "Raises:", "Example:", ">>>", "References:", "Time:"]:
            assert part in doc, (row.factory.__name__, part)
    assert (ROOT / "unrollgrad" / "py.typed").exists()


def test_nothing_in_the_library_imports_the_experiments():
    for path in (ROOT / "unrollgrad").rglob("*.py"):
        assert "import experiments" not in path.read_text()
        assert "from experiments" not in path.read_text()

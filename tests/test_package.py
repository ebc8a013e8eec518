"""The package for a newcomer: imports, the README, the public names."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unrollgrad as ug
from tests import stored
from tests.helpers import present
from unrollgrad.estimators import REGISTRY

ROOT = Path(__file__).parents[1]
TRAINED = ug.learned_optimizers.TRAINED


def formula(docstring):
    """A docstring's peak memory as the registry writes it."""
    said = " ".join(docstring.split("Memory:")[1].split())
    for words, letter in (("num_pairs", "N"), (" states", "S"), (" state", "S"), (" theta", "P")):
        said = said.replace(words, letter)
    return said.replace(" ", "")


@pytest.mark.parametrize(
    "name", ["full_es", "truncated_es", "pes", "es_single", "gpes", "dodge", "uoro"]
)
def test_a_docstring_has_the_memory_of_the_registry(name):
    row = REGISTRY[name]
    said, wanted = formula(present(row.factory.__doc__)), row.memory.replace(" ", "")
    assert re.match(re.escape(wanted) + r"(?![A-Z0-9+])", said), said


def test_without_the_extras():
    """The import needs no extra, and the trained optimizers work with the core alone."""
    command = [sys.executable, "-m", "tests.without_extras", *TRAINED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["imported"] == []
    assert list(TRAINED) == ["scheduled_adam", "scheduled_adam_mlps"]
    for name, losses in zip(TRAINED, found["losses"], strict=True):
        assert losses[-1] < 0.3 * losses[0]
        stored.expect(f"trained {name}", {str(20 * i): x for i, x in enumerate(losses)})


def test_the_experiments_without_the_extras_say_what_to_install():
    """One line, and no traceback."""
    hide = "import sys, runpy; sys.modules['tyro'] = None; runpy.run_module('experiments')"
    done = subprocess.run(
        [sys.executable, "-c", hide], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode != 0
    assert 'the experiments need tyro: pip install -e ".[experiments]"' in done.stderr


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

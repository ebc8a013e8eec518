"""The structure of the package: its imports, and the names that a user sees."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

import unrollgrad as ug
from tests.helpers import present

ROOT = Path(__file__).parents[1]
ORDER: list[str] = [
    *("types", "_checks", "_core", "noise", "constraints", "_training", "estimators", "samplers"),
    *("_workers", "_fit", "implicit", "bilevel", "apo", "learned_optimizers", "problems"),
    *("types", "_checks", "_core", "noise", "constraints", "_training", "estimators", "_workers"),
    *("_fit", "implicit", "bilevel", "stn", "apo", "learned_optimizers", "problems"),
    "diagnostics",
    *(
        "_fit",
        "_replay",
        "implicit",
        "bilevel",
        "apo",
        "learned_optimizers",
        "problems",
        "diagnostics",
    ),
    "running",
]
"""The rooms of ``unrollgrad``: each imports only from earlier rooms."""
MOST_PARAMETERS = 6
PUBLIC_FACTORIES = {
    "amigo",
    "average",
    "bome",
    "bsa",
    "bsvrb",
    "compare",
    "diagnose",
    "ddim",
    "delta_stn",
    "f2sa",
    "fit",
    "fsla",
    "hypergradient",
    "learning_rate",
    "linear_recurrence",
    "ma_soba",
    "mrbo",
    "penalty",
    "preconditioner",
    "saba",
    "soba",
    "solve",
    "spaba",
    "srba",
    "stn",
    "stocbio",
    "sustain",
    "training_problem",
    "ttsa",
}


def imports(path: Path) -> set[str]:
    """The modules that a file imports from the library, function-level imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name.split(".")[0] == "unrollgrad"}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def upward(path: Path) -> set[str]:
    """The imports of a library file that lead to a later room."""
    room = path.relative_to(ROOT / "unrollgrad").with_suffix("").parts[0]
    others = {name for name in imports(path) if name.split(".")[1] != room}
    return {name for name in others if ORDER.index(name.split(".")[1]) > ORDER.index(room)}


def test_imports_run_one_way():
    front_door = ROOT / "unrollgrad" / "__init__.py"
    found = {path: upward(path) for path in files("unrollgrad") if path != front_door}
    assert len(found) > 40
    assert not any(found.values()), found


def test_experiments_import_no_private_room():
    for path in files("experiments"):
        private = {name for name in imports(path) if "._" in name}
        assert not private, (path, private)


def test_a_user_sees_public_names_only():
    assert set(dir(ug)) >= set(ug.__all__)
    assert all(not name.startswith("_") for name in dir(ug) if not name.startswith("__"))


def test_a_module_lists_its_names():
    """Those that it lists exist; helpers that begin with an underscore are not among them."""
    modules = [path.relative_to(ROOT) for path in files("unrollgrad")]
    public = [p for p in modules if not any(part.startswith("_") for part in p.parts[1:-1])]
    public = [p for p in public if p.name == "__init__.py" or not p.name.startswith("_")]
    assert len(public) > 40
    for path in public:
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        importlib.import_module(name)
        module = sys.modules[name]  # not a function of the same name
        assert module.__all__, name
        for listed in module.__all__:
            assert hasattr(module, listed), (name, listed)
            assert not listed.startswith("_"), (name, listed)


def test_help_begins_with_a_map():
    """It has a line for every public name, and fits on a screen."""
    text = present(ug.__doc__)
    assert len(text.splitlines()) <= 25
    assert [name for name in ug.__all__ if not re.search(rf"\b{name}\b", text)] == []
    assert {"implicit", "bilevel"} <= set(dir(ug))


def parameters(function: ast.FunctionDef) -> int:
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    return len(names) + len(function.args.kwonlyargs) - (names[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("folder", ["unrollgrad", "experiments"])
def test_functions_have_few_parameters(folder):
    """Public factories may have more: their parameters are keyword-only settings."""
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in files(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and parameters(node) > MOST_PARAMETERS
        and not (folder == "unrollgrad" and node.name in PUBLIC_FACTORIES)
    ]
    assert not long

"""The manual: every public name is in the reference, every page has an example, links lead."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import unrollgrad as ug
from tests.helpers import counted

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
DIRECTIVE = re.compile(r"^::: (unrollgrad[\w.]*)$", re.MULTILINE)
EXAMPLE = re.compile(r"^>>> (?!import|from)", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
WITHOUT_ALL = {  # modules that have no `__all__`
    "noise": ["Noise", "gaussian", "orthogonal", "rademacher"],
    "constraints": [
        *("Constraint", "box", "constrain", "free", "positive", "report", "table"),
        *("unconstrain", "unit_interval"),
    ],
}


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    with counted() as programs:
        yield
    assert programs == [0]


def found(path: str) -> object:
    """The object that a directive names."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            target = getattr(target, name)
        return target
    raise AssertionError(path)


def public(module: ModuleType) -> dict[str, object]:
    """The public names of a module and of the public modules in it, with what they name."""
    short = module.__name__.rpartition(".")[2]
    names = getattr(module, "__all__", None) or WITHOUT_ALL.get(short)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
        ]
    objects = {}
    for name in names:
        value = getattr(module, name)
        inner = public(value) if isinstance(value, ModuleType) else {"": value}
        objects |= {f"{name}.{key}".rstrip("."): x for key, x in inner.items()}
    return objects


def missing(pages: list[str]) -> list[str]:
    """The public names that none of these reference pages has."""
    there = [found(path) for page in pages for path in DIRECTIVE.findall(page)]
    names = public(ug) | {f"estimators.{k}": x for k, x in public(ug.estimators).items()}
    return [name for name, value in names.items() if not any(value is x for x in there)]


def test_every_public_name_is_in_the_reference():
    assert len(public(ug)) > 80
    assert missing([page.read_text() for page in REFERENCE]) == []


def test_the_reference_names_no_module_by_mistake():
    """For mkdocstrings ``implicit.hypergradient`` is the file, not the function in it."""
    for page in REFERENCE:
        for path in DIRECTIVE.findall(page.read_text()):
            if path != "unrollgrad.running":
                assert not (ROOT / path.replace(".", "/")).with_suffix(".py").exists(), path


def test_a_name_that_is_not_in_the_reference_is_seen():
    pages = [page.read_text().replace("unrollgrad.implicit.root\n", "") for page in REFERENCE]
    assert missing(pages) == ["implicit.root"]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_a_page_has_an_example_that_runs(page):
    assert EXAMPLE.search(page.read_text())


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES, *REFERENCE], ids=lambda p: p.name)
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert [x for x in LINK.findall(text) if not (page.parent / x).exists()] == []


def test_links_and_examples_are_seen():
    assert LINK.findall("[a](b/c.md#d) ![e](f.png) [g](https://h) [i](#j)") == ["b/c.md", "f.png"]
    assert EXAMPLE.search(">>> import a\n>>> b\n")
    assert not EXAMPLE.search(">>> import a\n... >>> b\n```bash\nc\n")


@pytest.mark.parametrize("page", [*PAGES, *REFERENCE], ids=lambda p: p.name)
def test_a_page_is_in_the_manuals_table_of_contents(page):
    config = (ROOT / "mkdocs.yml").read_text()
    assert re.search(rf"[ :]{re.escape(str(page.relative_to(DOCS)))}$", config, re.MULTILINE)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_pages_load_nothing_from_elsewhere():
    """Scripts, styles and the fonts of formulas are in the repository."""
    config = (ROOT / "mkdocs.yml").read_text()
    extra = re.findall(r"^  - (javascripts/\S+)$", config, re.MULTILINE)
    assert len(extra) == 3
    assert "http" not in config
    assert all((DOCS / name).exists() for name in extra)
    katex = DOCS / "javascripts" / "katex"
    fonts = set(re.findall(r"url\((fonts/[\w-]+\.woff2)\)", (katex / "katex.min.css").read_text()))
    assert len(fonts) >= 20
    assert all((katex / name).exists() for name in fonts)
    files = [path for path in (DOCS / "javascripts").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000

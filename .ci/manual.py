"""Hooks of the manual: files beside docs/, pages of other branches, and examples in docstrings.

mkdocs reads the functions ``on_...``; griffe, which reads docstrings, reads the extension.
"""

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
BESIDE = (
    *("experiments/RESULTS.md", "experiments/results/*/figure.png", "notebooks/*.ipynb"),
    *("CONTRIBUTING.md", "CHANGELOG.md"),
)
METHODS = "Related methods"


def on_config(config):
    """Puts pages that no section names into the section of methods."""
    named = re.findall(r"[\w/]+\.md", str(config["nav"]))
    (methods,) = (section[METHODS] for section in config["nav"] if METHODS in section)
    pages = sorted(Path(config["docs_dir"]).glob("*.md"))
    methods += [page.name for page in pages if page.name not in named]
    return config


def on_files(files, config):
    """Adds what lies beside docs/ in the repository, under the same names."""
    for path in (path for pattern in BESIDE for path in sorted(ROOT.glob(pattern))):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config["site_dir"], use_directory_urls=False))
    return files


def on_page_markdown(markdown, page, config, files):
    """In the repository these files are one folder above docs/; in the site, beside the pages."""
    if page.file.src_dir == str(ROOT):
        return markdown
    return re.sub(r"\]\(\.\./(?=experiments/|notebooks/|[A-Z]+\.md)", "](", markdown)


class Examples(griffe.Extension):
    """Docstrings say ``Example:``; griffe knows a section of code as ``Examples:``."""

    def on_instance(self, *, obj, **kwargs):
        """Renames the section of one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.M
            )

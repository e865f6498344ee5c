"""The documentation as a site: Sphinx reads the Markdown files where they lie (`make docs`).

The source folder is the whole repository, so that links mean the same here as in the files. The README is
the first page.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.domains.python import PyObject
from sphinx.util.inspect import signature, stringify_signature
from sphinx.util.logging import getLogger

import normwise

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# caption: {page: its name in the navigation}
NAVIGATION = {
    "Start in five minutes": {
        "docs/start/cnn": "A CNN",
        "docs/start/language-model": "A language model",
        "docs/start/vocoder": "A vocoder",
        "docs/start/researcher": "Research",
    },
    "How to": {
        "docs/integrations": "Adopt it in a trainer or a loop",
        "docs/how-to/migrate": "Migrate from weight_decay",
        "docs/how-to/fine-tune": "Fine-tune a trained model",
        "docs/distributed": "Use DDP, FSDP2, tensor parallelism",
        "docs/how-to/bf16": "Train in half precision",
        "docs/monitor": "Watch a training",
        "docs/how-to/compare-rules": "Compare decay rules on your network",
    },
    "Concepts": {
        "docs/theory": "Theory",
        "docs/decay": "Decay rules",
        "docs/normalization": "The weight-normalisation family",
        "docs/invariances": "Invariances",
        "docs/planning": "Planning, and the start in equilibrium",
        "docs/architectures": "Decay in known architectures",
    },
    "API": {
        "docs/api/planning": "Planning and auditing",
        "docs/api/decay": "Decay rules",
        "docs/api/normalization": "Normalisation",
        "docs/api/invariances": "Invariances",
        "docs/api/monitor": "Monitoring",
        "docs/api/theory": "Theory",
        "docs/api/trainers": "Trainers",
    },
    "Results": {
        "docs/results/README": "Reference results",
        "docs/reproducing": "Reproducing them",
        "docs/training": "Networks of the paper's size",
        "docs/data": "Data",
        "docs/other-libraries": "What other libraries do",
        "docs/measurements": "Measurements",
    },
    "Project": {"CHANGELOG": "Changelog", "CONTRIBUTING": "Contributing"},
}

project = "normwise"
copyright = "The normwise developers"  # noqa: A001 (Sphinx calls it so)
release = version = normwise.__version__

root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "benchmarks/results/*.md"]
exclude_patterns = ["site", "build", ".*", "runs", "DESCRIPTION.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

myst_heading_anchors = 4  # as GitHub makes them

autodoc_member_order = "bysource"
autodoc_mock_imports = ["accelerate", "lightning", "transformers"]  # the site needs none of them
autodoc_inherit_docstrings = False  # a rule's formulas are documented in the base class
autodoc_typehints = "none"  # signatures are long enough without; the arguments' texts say what they take
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False

html_theme = "furo"
html_title = "normwise"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def setup(app: Sphinx) -> None:
    """Connect what the settings above cannot say."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _name_the_first_page)
    app.connect("build-finished", _check_that_nothing_is_fetched)


def _signature(
    app: Sphinx,
    what: str,
    name: str,
    documented: Any,
    options: Any,
    arguments: str | None,
    returned: str | None,
) -> tuple[str | None, str | None] | None:
    """Show the arguments of classes whose base is a stand-in, and none of results."""
    if what == "class" and arguments == "(*args, **kwargs)":
        own = signature(documented.__init__, bound_method=True)
        return stringify_signature(own, show_annotation=False), None
    return ("", None) if arguments and "<factory>" in arguments else None


def _add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            listed = "\n".join(f"{title} </{name}>" for name, title in pages.items())
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n{listed}\n```\n"


def _name_the_first_page(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        folder = Path(app.outdir)
        shutil.copyfile(folder / f"{root_doc}.html", folder / "index.html")


def _check_that_nothing_is_fetched(app: Sphinx, error: Exception | None) -> None:
    """Warn if a page needs the network: scripts, styles and figures lie in the site."""
    fetched = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"((?:https?:)?//[^\"]*)")
    for page in Path(app.outdir).rglob("*.html"):
        for address in fetched.findall(page.read_text("utf-8")):
            getLogger(__name__).warning("%s: a reader would fetch %s", page, address)

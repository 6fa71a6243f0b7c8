"""The site's settings: `bash launch/docs.sh` builds it with Sphinx, the theme Furo and MyST, which reads Markdown.

The pages are written for GitHub. What it shows otherwise than Sphinx is rewritten when a page is read:

- A line with nothing but a link to a page of the repository's root, such as README.md, becomes that page's text.
- `<picture>`, a picture for light and one for dark, becomes two images, of which the theme shows one.
- A link to a source file leads to a page with that file, lines numbered. So does a docstring's reference to what has no
  description of its own in docs/reference.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc.mock import MockFinder
from sphinx.util import logging

import hdet

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "hdet"
author = "hdet maintainers"
project_copyright = author
version = release = hdet.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
suppress_warnings = ["toc.not_included"]  # check_navigation says what to do
html_theme = "furo"
html_title = "hdet"
html_copy_source = False
html_static_path, html_css_files = ["site.css"], ["site.css"]
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": False}
pygments_style, pygments_dark_style = "friendly", "native"
myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "source": {"url": "{{path}}#{{fragment}}"}}

autodoc_default_options = {"members": True, "member-order": "bysource", "undoc-members": False}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
# What the adapters are for is not needed to read them, and takes long to import.
sys.meta_path.insert(0, MockFinder(["accelerate", "deepspeed", "lightning", "transformers"]))
python_maximum_signature_line_length = 100
autosummary_generate = False
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_param, napoleon_use_ivar = False, True
hdet.Settings.__annotations__ = get_type_hints(hdet.Settings)  # without the checks that are noted beside the types
toc_object_entries = False  # they take a third of the time
# A reference to a part of hdet must lead to its description or its source. Types of torch and Python have no page here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!hdet\.).*")]

log = logging.getLogger(__name__)

LINK = re.compile(r"(?<!!)\]\((?!\w+:|#)([^)\s#]*)(#[^)\s]*)?\)")
PICTURE = re.compile(r'<picture>\s*<source [^>]*srcset="([^"]+)"[^>]*>\s*<img ([^>]*)>\s*</picture>')
WHOLE = re.compile(r"^\[([A-Z]+\.md)\]\(\.\./\1\)$", re.MULTILINE)
FENCE = re.compile(r"^```(.*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SOURCES = "sources"
"""The folder of the site in which source files lie."""


def page_of(target: Path) -> Path:
    """The page of docs/ that has a Markdown file's text."""
    if target.parent == ROOT and target.suffix == ".md":
        pages = [page for page in DOCS.glob("*.md") if target.name in WHOLE.findall(page.read_text(encoding="utf-8"))]
        return pages[0] if pages else target
    return target


def read_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Rewrite what GitHub shows otherwise."""
    page = Path(app.env.doc2path(docname))
    if page.suffix != ".md":
        return
    linked: dict[str, set[str]] = app.env.__dict__.setdefault("hdet_sources", {})
    linked[docname] = set()

    def relative(path: Path) -> str:
        return Path(os.path.relpath(path, page.parent)).as_posix()

    def rewritten(text: str, base: Path) -> str:
        def link(match: re.Match[str]) -> str:
            target, fragment = page_of((base / match[1]).resolve()), match[2] or ""
            if DOCS in target.parents and target.suffix != ".py":
                return f"]({relative(target)}{fragment})"
            if not target.exists() or ROOT not in target.parents:
                log.warning("a link to %s, which does not exist", match[1], location=docname)
                return match[0]
            linked[docname].add(target.relative_to(ROOT).as_posix())
            line = fragment.removeprefix("#L") or "1"
            up = "../" * docname.count("/")
            return f"](source:{up}{SOURCES}/{target.relative_to(ROOT).as_posix()}.html#L-{line})"

        def picture(match: re.Match[str]) -> str:
            attributes = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            images = {"light": attributes["src"], "dark": match[1]}
            options = f":alt: {attributes['alt']}\n:class: only-"
            return "\n".join(
                f"```{{image}} {relative((base / file).resolve())}\n{options}{mode}\n```\n"
                for mode, file in images.items()
            )

        text = FENCE.sub(lambda match: f"```{match[1] or 'text'}\n{match[2]}```", text)  # equations are no Python
        return PICTURE.sub(picture, LINK.sub(link, text))

    parts = WHOLE.split(source[0])  # text, name, text, name, ..., text
    source[0] = "".join(
        rewritten((ROOT / part).read_text(encoding="utf-8"), ROOT) if i % 2 else rewritten(part, page.parent)
        for i, part in enumerate(parts)
    )


def source_of(app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.Element) -> nodes.Element | None:
    """What a docstring refers to and docs/reference leaves out: the file in which it is."""
    parts = node["reftarget"].split(".") if "reftarget" in node else []
    for end in range(len(parts), 0, -1):
        path = Path(*parts[:end])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if parts[0] == "hdet" and (end > 1 or len(parts) == 1) and (ROOT / file).exists():
                env.__dict__["hdet_sources"].setdefault(node["refdoc"], set()).add(file.as_posix())
                up = "../" * node["refdoc"].count("/")
                return nodes.reference("", "", content, refuri=f"{up}{SOURCES}/{file.as_posix()}.html")
    return None


def keep_colon(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Let an attribute's docstring be text. Napoleon takes what is before a colon in its first line for a type."""
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")


def forget(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    env.__dict__.get("hdet_sources", {}).pop(docname, None)


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each source file and folder that is linked."""
    for name in sorted(set().union(*app.env.__dict__.get("hdet_sources", {}).values())):
        path = ROOT / name
        text = "\n".join(sorted(file.name for file in path.iterdir())) if path.is_dir() else path.read_text("utf-8")
        try:
            lexer = TextLexer() if path.is_dir() else get_lexer_for_filename(path.name)
        except ClassNotFound:
            lexer = TextLexer()
        code = highlight(text, lexer, HtmlFormatter(linenos="inline", lineanchors="L", cssclass="highlight"))
        yield f"{SOURCES}/{name}", {"title": name, "body": f"<h1>{name}</h1>\n{code}"}, "page.html"


def check_navigation(app: Sphinx, env: BuildEnvironment) -> None:
    """Every page has its place in the navigation."""
    listed = {page for pages in env.toctree_includes.values() for page in pages}
    for docname in sorted(env.found_docs - listed - {app.config.root_doc}):
        log.warning(
            "docs/%s is not in the navigation. Add a line with %s to one of the lists ```{toctree} in docs/index.md",
            Path(env.doc2path(docname)).relative_to(DOCS).as_posix(),
            docname,
        )


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", keep_colon, priority=400)  # before Napoleon
    app.connect("source-read", read_page)
    app.connect("env-purge-doc", forget)
    app.connect("missing-reference", source_of)
    app.connect("html-collect-pages", source_pages)
    app.connect("env-check-consistency", check_navigation)
    return {"parallel_read_safe": False}

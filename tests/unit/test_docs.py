"""The documentation builds with no warning and no network, its links lead somewhere, and it has all that is public."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

for package in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
pytestmark = pytest.mark.timeout(600)
PUBLIC = ("hdet", "hdet.controller", "hdet.observe", "hdet.schedules", "hdet.ops")
ADAPTERS = ("accelerate", "dcp", "deepspeed", "lightning", "transformers")


def build(pages, site):
    """Sphinx, as launch/docs.sh calls it."""
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--builder", "html"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "", "https_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(pages), str(site)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


class Page(HTMLParser):
    """What a page refers to, and where it can be entered."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.ids = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.update(given[name] for name in ("id", "name") if given.get(name))
        target = given.get("href") or given.get("src")
        if target and tag == "a":
            self.links.append(target)
        elif target and given.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.loaded.append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(DOCS, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_links_lead_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        for target in page.links + page.loaded:
            if re.match(r"\w+:", target):
                continue
            file, _, fragment = target.partition("#")
            found = (path.parent / unquote(file.partition("?")[0])).resolve() if file else path
            is_there = found.exists() and (not fragment or found not in pages or unquote(fragment) in pages[found].ids)
            if not is_there:
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken, "\n".join(broken)
    assert len(pages) > 50


def test_no_page_loads_anything_from_the_network(pages):
    assert [target for page in pages.values() for target in page.loaded if re.match(r"(\w+:)?//", target)] == []


def test_the_reference_has_all_that_is_public(site):
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()  # four lines of head
    described = {line.split()[0] for line in inventory.splitlines() if " py:" in line}
    missing = []
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            item = getattr(sys.modules[module], name)
            home = f"{getattr(item, '__module__', None)}.{getattr(item, '__qualname__', None)}"
            if not {f"{module}.{name}", f"hdet.{name}", f"hdet.controller.{name}", home} & described:
                missing.append(f"{module}.{name}")
    for adapter in ADAPTERS:
        source = (ROOT / "hdet" / "integrations" / f"{adapter}.py").read_text(encoding="utf-8")
        names = re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", source, re.MULTILINE)
        missing += sorted({f"hdet.integrations.{adapter}.{name}" for name in names} - described)
    assert not missing, f"{missing} are public, and docs/reference leaves them out"


def test_a_page_that_is_not_in_the_navigation_is_told(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(DOCS / "conf.py", docs)
    (docs / "index.md").write_text("# Front\n\n```{toctree}\nlisted\n```\n")
    (docs / "listed.md").write_text("# Listed\n\n[nothing](../nothing.py)\n")
    (docs / "added.md").write_text("# Added\n")
    done = build(docs, tmp_path / "site")
    assert done.returncode != 0
    assert "docs/added.md is not in the navigation. Add a line with added to one of the lists" in done.stderr
    assert "a link to ../nothing.py, which does not exist" in done.stderr
    assert "listed.md is not" not in done.stderr

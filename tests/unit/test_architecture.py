"""docs/architecture.md says what the sources say: diagram, list of packages, and the lines of the walk."""

import importlib.util
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE, DIAGRAM = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.svg"
MEND = "The sources have changed. Write both anew: python docs/draw_architecture.py"


@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_diagram_is_what_the_imports_are(drawing):
    assert DIAGRAM.read_text(encoding="utf-8") == drawing.draw(), MEND


def test_the_diagram_has_an_arrow_for_each_import_between_layers(drawing):
    namespace = "{http://www.w3.org/2000/svg}"
    titles = [title.text for title in ET.fromstring(drawing.draw()).findall(f"{namespace}g/{namespace}title")]
    drawn = {tuple(re.match(r"(\S+) imports from (\S+): (\d+)", title).groups()) for title in titles}
    assert drawn == {(own, other, str(n)) for (own, other), n in drawing.edges(drawing.layers()).items()}
    assert ("converge", "replicas") in {(own, other) for own, other, _ in drawn}


def test_arrows_point_downwards(drawing):
    order = drawing.layers()
    assert all(order.index(other) < order.index(own) for own, other in drawing.edges(order))


def test_the_page_has_the_packages_and_lines_of_now(drawing):
    page = PAGE.read_text(encoding="utf-8")
    assert page == drawing.written(page), MEND


def test_links_of_the_page_lead_somewhere():
    page = PAGE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", page):
        assert (PAGE.parent / target).exists(), target


def test_the_walk_notices_a_line_that_is_gone(drawing, tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(
        "class Loss:\n    def step(self):\n        return 1\n\n\ndef step():\n    return 2\n"
    )
    monkeypatch.setattr(drawing, "ROOT", tmp_path)
    assert drawing.line_of(drawing.Step("a.py", "return 2", "")) == 7
    assert drawing.line_of(drawing.Step("a.py", "return", "", scope="Loss.step")) == 3
    for anchor, scope, message in [
        ("return 3", "", "'return 3' is in 0 lines of a.py. Must be in one"),
        ("return", "", "'return' is in 2 lines of a.py. Must be in one"),
        ("return", "Loss.walk", "a.py has 0 definitions of Loss.walk. Must have one"),
    ]:
        with pytest.raises(ValueError, match=message):
            drawing.line_of(drawing.Step("a.py", anchor, "", scope))

"""docs/troubleshooting.md has every message that hdet gives at run time, as it is in the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
PROGRAMS = ("bench", "train")  # they say what they have to say themselves
ERRORS = ("HdetError", "ReplicaMismatchError", "DivergedError")


def text_of(node):
    """A string of the sources, with "..." for what is filled in; None if it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdrg]", "...", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return "".join(text_of(part) or "..." for part in (node.left, node.right))
    return None


def strings():
    """All strings of the library, and those that are raised or warned of at run time."""
    found, told = [], {}
    for path in sorted((ROOT / "hdet").rglob("*.py")):
        if path.relative_to(ROOT / "hdet").parts[0] in PROGRAMS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (text := text_of(node)) is not None:
                found.append(text)
            if isinstance(node, ast.Call) and node.args:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                is_told = name in ERRORS or (name in ("warning", "warn") and isinstance(node.func, ast.Attribute))
                if is_told and (text := text_of(node.args[0])) is not None:
                    told[f"{path.relative_to(ROOT)}:{node.lineno}"] = text
    return found, told


def listed():
    """The messages of the page: the code in the first column of the tables by message."""
    section = PAGE.read_text(encoding="utf-8").split("## By message")[1]
    return re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)


def has(message, text):
    """Whether a message of the page is in a string: its pieces, in order."""
    pieces = [re.escape(piece) for piece in re.split(r"\.\.\.+", message) if piece.strip()]
    return bool(re.search(".*".join(pieces), text, re.DOTALL))


@pytest.fixture(scope="module")
def sources():
    return strings()


def test_every_message_of_a_run_is_on_the_page(sources):
    _, told = sources
    missing = [
        f"{where}: {text}" for where, text in told.items() if not any(has(message, text) for message in listed())
    ]
    assert not missing, "Add them to docs/troubleshooting.md, by message:\n" + "\n".join(missing)
    assert len(told) > 30


def test_every_message_of_the_page_is_in_the_sources(sources):
    found, _ = sources
    stale = [message for message in listed() if not any(has(message, text) for text in found)]
    assert not stale, stale
    assert len(listed()) > 60


def test_a_message_that_has_changed_is_noticed():
    assert has("Step ...: the run blew up: ...", "Step ...: the run blew up: .... Back to the last good state")
    assert not has("Step ...: the run blew up: ...", "Step ...: the run diverged: ...")
    assert text_of(ast.parse('f"a {x} b" + c', mode="eval").body) == "a ... b..."

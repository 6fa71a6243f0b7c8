"""``python docs/make_settings.py``: writes docs/settings.md, the table of all settings, from their declarations."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_type_hints

import hdet
from hdet.settings import DECLARED, GROUPS, Setting, Settings, documentation

HEAD = """# Settings

What `hdet.OneCycleLR` and `hdet.Ensemble` take by keyword. This page is made by `python docs/make_settings.py` from
[hdet/settings](../hdet/settings); the training program's `--help` shows the same texts.
"""


def plain(text: str) -> str:
    """A docstring's markup as Markdown's, fit for a table's cell."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", "\\|")


def shown(value: Any) -> str:
    """A default as it would be written."""
    if dataclasses.is_dataclass(value):
        return f"`hdet.{type(value).__name__}()`" if hasattr(hdet, type(value).__name__) else f"`{value!r}`"
    return f"`{value!r}`"


def type_of(hint: Any) -> str:
    """A type as it would be written."""
    name = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    name = re.sub(r"[\w.]+\.(\w+)", r"\1", name.replace("NoneType", "None"))
    return plain(f"`{name}`")


def table(kind: type, defaults: dict[str, Any]) -> str:
    """Name, type, default and text of every field."""
    hints, texts = get_type_hints(kind), documentation(kind)
    rows = [
        f"| `{name}` | {type_of(hints[name])} | {shown(default)} | {plain(texts[name])} |"
        for name, default in defaults.items()
    ]
    return "\n".join(["| setting | type | default | |", "|---|---|---|---|", *rows])


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Of a dataclass's field."""
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]


def page() -> str:
    """The whole page."""
    declared: dict[str, Setting] = DECLARED
    parts = [HEAD, table(Settings, {name: setting.default for name, setting in declared.items()})]
    for name, kind in GROUPS.items():
        defaults = {field.name: default_of(field) for field in dataclasses.fields(kind)}
        parts.append(f"\n## `{name}=hdet.{kind.__name__}(...)`\n\n{table(kind, defaults)}")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "settings.md").write_text(page(), encoding="utf-8")

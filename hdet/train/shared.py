"""Settings that are the same in the training program's section ``hdet`` as in hdet."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from typing import Any, get_type_hints

from hdet.settings import DECLARED, Settings, documentation

SHARED = ("converge_every", "per_group", "gradients", "averaging", "outer", "exploration", "seed")
"""Their names."""


def _shared_settings() -> Any:
    """A dataclass of :data:`SHARED`: types, defaults and texts are hdet's."""
    hints, texts = get_type_hints(Settings), documentation(Settings)
    shared = make_dataclass(
        "Shared",
        [(name, hints[name], field(default=DECLARED[name].default, metadata={"doc": texts[name]})) for name in SHARED],
        frozen=True,
        kw_only=True,
    )
    shared.__module__ = __name__
    return shared


Shared: Any = _shared_settings()

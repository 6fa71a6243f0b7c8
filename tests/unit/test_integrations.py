"""Adapters: imported on use only, and clear about what is missing."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import hdet

ROOT = Path(hdet.__file__).parent
FRAMEWORKS = {"lightning", "transformers", "accelerate", "deepspeed", "peft"}


@pytest.mark.parametrize("name", ["lightning", "transformers", "accelerate", "deepspeed"])
def test_a_framework_that_is_missing_is_told_with_what_to_install(monkeypatch, name):
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"hdet.integrations.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=f"hdet.integrations.{name} needs .*pip install .*{name}"):
        importlib.import_module(f"hdet.integrations.{name}")


def test_a_framework_is_imported_in_its_own_adapter_only():
    for path in ROOT.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
        where = path.relative_to(ROOT)
        if where.parts[0] not in ("bench", "train"):
            assert names & FRAMEWORKS <= {path.stem.removesuffix("_weights")}, where

"""The Python snippets of the README and of docs/get_started.md pass mypy in strict mode, and pyright where it is there.

A snippet is a fragment: what it takes for granted (a model, a loader) is declared in front of it, from ``GIVEN``. Of a
diff the new side is read, and ``...`` that stands for more arguments is left out.
"""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[2]
IMPORTS = """\
from collections.abc import Callable, Iterable, Sequence
from typing import Any
import torch
from torch import Tensor, nn
import hdet
def given() -> Any: ...
"""
MODULES = {
    "DistributedDataParallel": "from torch.nn.parallel import DistributedDataParallel",
    "F": "import torch.nn.functional as F",
    "dist": "import torch.distributed as dist",
    "L": "import lightning as L",
}
LOADER = "torch.utils.data.DataLoader[tuple[Tensor, Tensor]]"
GIVEN = {
    **dict.fromkeys(("model", "net"), "nn.Module"),
    "module": "Any",  # a LightningModule
    "optimizer": "torch.optim.Optimizer",
    "scheduler": "hdet.OneCycleLR",
    "ensemble": "hdet.Ensemble",
    "any_torch_scheduler": "torch.optim.lr_scheduler.LRScheduler",
    **dict.fromkeys(("loader", "train_loader", "probe_loader", "validation_loader"), LOADER),
    **dict.fromkeys(("batches", "micro_batches"), "Sequence[tuple[Tensor, Tensor]]"),
    "batch": "tuple[Tensor, Tensor]",
    "loss_fn": "Callable[[nn.Module, Any], Tensor]",
    "loss": "Tensor",
    **dict.fromkeys(("steps", "total_steps", "epochs", "K", "N", "T"), "int"),
    **dict.fromkeys(("max_lr", "lr"), "float"),
    "gradient_norms": "Sequence[float]",
    **dict.fromkeys(("trainer", "Trainer", "accelerator", "arguments", "dataset", "config"), "Any"),  # a framework's
}
"""Names that snippets use and do not define, and their types."""
SETTINGS = """\
[mypy]
strict = True
untyped_calls_exclude = torch
[mypy-accelerate.*,datasets.*,deepspeed.*,lightning.*,transformers.*]
follow_imports = skip
ignore_missing_imports = True
[mypy-hdet,hdet.*]
follow_imports = silent
"""


def snippets(text: str) -> list[tuple[int, str]]:
    """The Python blocks of a Markdown page, and the Python of the new side of its diffs, with their lines."""
    found = []
    for block in re.finditer(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        language, code = block[2], textwrap.dedent(block[3])
        if language == "diff":
            lines = [line[1:] for line in code.splitlines() if not line.startswith(("-", "@@", "+++"))]
            code = textwrap.dedent("\n".join(lines)) + "\n"
            if not is_python(code):  # of a configuration or a command
                continue
        if language in ("python", "py", "diff"):
            found.append((text.count("\n", 0, block.start(3)) + 1, code))
    return found


def is_python(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


class Abridged(ast.NodeTransformer):
    """Leaves out ``...`` where it stands for more arguments or elements."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        node.args = [argument for argument in node.args if not is_ellipsis(argument)]
        node.keywords = [keyword for keyword in node.keywords if not is_ellipsis(keyword.value)]
        return node

    def visit_List(self, node: ast.List) -> ast.List:
        self.generic_visit(node)
        node.elts = [element for element in node.elts if not is_ellipsis(element)]
        return node


def is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def completed(code: str) -> str:
    """A snippet as a module of its own.

    Raises:
        SyntaxError: if it is no Python.
        ValueError: if it uses a name that neither it nor ``GIVEN`` defines.
    """
    tree = Abridged().visit(ast.parse(code))
    nodes = list(ast.walk(tree))
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {alias.asname or alias.name.split(".")[0] for alias in nodes if isinstance(alias, ast.alias)}
    defined |= {"hdet", "torch", "Tensor", "nn", *dir(builtins)}
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    imports, declared = [], []
    for name, is_read in first_uses(tree).items():
        if not is_read or name in defined:
            continue
        if name in MODULES:
            imports.append(MODULES[name])
        elif name in GIVEN:
            declared.append(f"{name}: {GIVEN[name]} = given()")
        elif name not in arguments:
            raise ValueError(f"The snippet uses {name}, which it does not define. Add its type to GIVEN.")
    return "\n".join([IMPORTS, *imports, *declared, ast.unparse(tree), ""])


def first_uses(tree: ast.AST) -> dict[str, bool]:
    """All names, and whether each is read before it is written: ``model = wrap(model)`` takes a model for granted."""
    found: dict[str, bool] = {}

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Name):
            found.setdefault(node.id, isinstance(node.ctx, ast.Load))
        fields = sorted(node._fields, key=lambda name: name not in ("value", "iter", "generators"))  # before targets
        for field in fields:
            value = getattr(node, field, None)
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child)

    visit(tree)
    return found


def written(folder: Path, text: str) -> list[Path]:
    """A file for each snippet of a page."""
    paths = []
    for line, code in snippets(text):
        try:
            module = completed(code)
        except (SyntaxError, ValueError) as error:
            pytest.fail(f"The snippet at line {line}: {error}\n{code}")
        paths.append(folder / f"line_{line}.py")
        paths[-1].write_text(module, encoding="utf-8")
    return paths


def mypy(folder: Path, paths: list[Path]) -> subprocess.CompletedProcess[str]:
    (folder / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    options = [
        "--config-file",
        folder / "mypy.ini",
        "--cache-dir",
        ROOT / ".mypy_cache" / "snippets",
        "--no-error-summary",
    ]
    command = [sys.executable, "-m", "mypy", *options, *paths]
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)


def failure(paths: list[Path], said: str) -> str:
    numbered = (
        f"{i:>3}  {line}" for path in paths for i, line in enumerate([path.name, *path.read_text().splitlines()])
    )
    return said + "\n" + "\n".join(numbered)


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """The files of the pages' snippets."""
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/get_started.md")]
    paths = written(tmp_path_factory.mktemp("snippets"), "\n".join(pages))
    assert len(paths) > 1
    return paths


@pytest.mark.timeout(600)
def test_mypy_passes_the_readme_in_strict_mode(readme):
    done = mypy(readme[0].parent, readme)
    assert done.returncode == 0, failure(readme, done.stdout + done.stderr)


@pytest.mark.timeout(600)
@pytest.mark.slow  # pyright brings its own program with npm when it is first called
def test_pyright_passes_the_readme(readme):
    pytest.importorskip("pyright")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *map(str, readme)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, failure(readme, done.stdout + done.stderr)


def test_a_snippet_that_is_wrong_is_found(tmp_path):
    page = "```python\nscheduler = hdet.OneCycleLR(optimizer, ..., model=model, spred=1 / 9)\n```\n"
    page += "```diff\n-loss = model(batch)\n+model.step()\n+scheduler.step('low')\n```\n"
    page += "```diff\n+strategy: fsdp\n+  replicas: [2\n```\n```bash\nls\n```\n"
    paths = written(tmp_path, page)
    assert [path.name for path in paths] == ["line_2.py", "line_5.py"]
    said = mypy(tmp_path, paths).stdout
    assert 'Unexpected keyword argument "spred" for "OneCycleLR"' in said
    assert '"step" of "OneCycleLR" has incompatible type "str"' in said


def test_a_name_from_nowhere_is_told():
    with pytest.raises(ValueError, match="uses modle, which it does not define"):
        completed("hdet.find_lr(modle, optimizer, loss_fn, loader)")

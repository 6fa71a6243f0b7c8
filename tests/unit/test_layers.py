"""The house rules of the code: imports point downwards only, and collectives are called from one file."""

import ast
from pathlib import Path

import pytest

import hdet

ROOT = Path(hdet.__file__).parent

# Lowest first: a package, or a module directly under hdet, imports from those that stand before it.
LAYERS = [
    "errors", "transaction", "files", "ops", "schedules",
    "replicas", "model", "explore", "converge", "observe", "steer", "controller", "monitor",
    "settings", "ensemble", "lr_scheduler", "report",
    "integrations", "train", "bench", "__main__",
]  # fmt: skip
PURE = [  # no torch
    "errors", "files/plain", "schedules/course", "schedules/curves", "schedules/decays", "schedules/onecycle",
    "schedules/open_ended", "explore/spread", "explore/design", "explore/prior", "observe/slopes", "steer/attribution",
    "steer/controllers", "steer/observation", "steer/one_slope", "steer/posterior", "steer/published", "steer/report",
    "steer/running_average", "monitor/report", "monitor/story", "monitor/tables",
    "report/charts",
]  # fmt: skip
ADAPTERS = {"lr_scheduler", "integrations", "train", "bench"}
MAY_USE_ADAPTERS = {"train": {"integrations", "lr_scheduler"}, "bench": {"lr_scheduler", "train"}}
FRONT_DOOR_USERS = {"integrations", "train", "bench", "__main__"}
# Only the training program and the benchmark start and end process groups, and save sharded models; training code never
# does.
PROCESS_OWNERS = {"train", "bench"}
LIFE_CYCLE = {
    "checkpoint",
    "init_process_group",
    "PrefixStore",
    "Store",
    "TCPStore",
    "rendezvous",
    "destroy_process_group",
    "barrier",
    "is_initialized",
    "is_available",
    "is_nccl_available",
}
HARMLESS = {"Work", "ReduceOp", "ProcessGroup", "device_mesh", "tensor", "get_rank", "get_world_size", "fsdp"}


def files():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth of the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    own = layer_of(path)
    assert own in LAYERS, f"{own} has no place in the layers yet"
    for name in imported(path):
        package, other, *_ = [*name.split("."), ""]
        if package != "hdet":
            continue
        if other not in LAYERS:
            assert own in FRONT_DOOR_USERS, f"{path.name} imports the front door"
            continue
        if other == own:
            continue
        assert LAYERS.index(other) < LAYERS.index(own), f"{path.name} imports {name}, which is above it"
        if own in ADAPTERS and other in ADAPTERS:
            assert other in MAY_USE_ADAPTERS.get(own, ()), f"adapter {own} imports adapter {other}"


@pytest.mark.parametrize("name", PURE)
def test_the_pure_layer_knows_no_torch(name):
    assert not any(module.split(".")[0] == "torch" for module in imported(ROOT / f"{name}.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_collectives_are_called_from_one_file(path):
    if path == ROOT / "replicas" / "topology.py" or layer_of(path) == "bench":
        return
    allowed = HARMLESS | (LIFE_CYCLE if layer_of(path) in PROCESS_OWNERS else set())
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist":
            assert node.attr in allowed, f"{path.name}:{node.lineno} uses torch.distributed.{node.attr}"
    for name in imported(path):
        if name.startswith("torch.distributed."):
            assert name.split(".")[2] in allowed, f"{path.name} imports {name}"


def test_the_front_door_is_small():
    assert len(hdet.__all__) <= 26
    assert all(hasattr(hdet, name) for name in hdet.__all__)

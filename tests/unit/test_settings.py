"""Settings: declared once, and what is made from the declarations."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hdet
from hdet.settings import DECLARED, GROUPS, Settings, documentation, resolve
from hdet.train.config import Config, parse
from hdet.train.shared import SHARED

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))


def test_the_page_of_settings_is_what_the_declarations_say():
    import make_settings

    assert (ROOT / "docs" / "settings.md").read_text() == make_settings.page(), "run python docs/make_settings.py"


def test_every_setting_has_a_text_and_a_default_that_passes_its_check():
    texts = documentation(Settings)
    assert list(texts) == list(DECLARED) == list(Settings.__annotations__)
    for name, setting in DECLARED.items():
        assert texts[name].endswith("."), name
        setting.check(name, setting.default)
    for kind in GROUPS.values():
        assert list(documentation(kind)) == [field.name for field in dataclasses.fields(kind)]


def test_the_constructors_name_no_setting_themselves():
    for kind in (hdet.OneCycleLR, hdet.Ensemble):
        assert not set(inspect.signature(kind).parameters) & set(DECLARED)


def test_the_training_program_has_hdets_types_defaults_and_texts(capsys):
    pytest.importorskip("jsonargparse")
    config = Config()
    for name in SHARED:
        assert getattr(config.hdet, name) == DECLARED[name].default
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert documentation(hdet.Averaging)["bucket_mib"] in shown
    assert "Whether each parameter group has a gain" in shown


def test_resolving_fills_in_defaults_and_changes_nothing():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    resolved = resolve(optimizer, 1000, {"model": model, "spread": 0.1})
    assert list(resolved.given) == list(DECLARED)
    assert (resolved.converge_every, resolved.size, resolved.optimizer_state) == (10, 1, "verify")
    assert resolved.plain["averaging.bucket_mib"] == 64.0
    assert not optimizer._optimizer_state_dict_post_hooks


CALLS = """
import torch
import hdet

model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = hdet.OneCycleLR(
    optimizer, 0.1, 100, model=model, spread=0.1, averaging=hdet.Averaging(bucket_mib=1.0), gradients="local",
    outer=hdet.Outer(momentum=0.9),
)
gain: float = scheduler.ensemble.gains[0]
report = scheduler.converge()
hdet.Ensemble(optimizer, model=model, spread=0.1, converge_every=5)
"""
WRONG = [
    ('hdet.OneCycleLR(optimizer, 0.1, 100, spread="wide")', "spread"),
    ("hdet.OneCycleLR(optimizer, 0.1, 100, sprad=0.1)", "sprad"),
    ('hdet.Ensemble(optimizer, gradients="mine")', "gradients"),
]


def test_a_type_checker_sees_every_setting(tmp_path):
    """mypy takes right calls, strictly, and finds wrong names and types."""
    pytest.importorskip("mypy")
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(CALLS)
    bad.write_text(CALLS + "\n".join(call for call, _ in WRONG) + "\n")
    (tmp_path / "setup.cfg").write_text("[mypy]\nignore_missing_imports = True\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--config-file",
        tmp_path / "setup.cfg",
    ]

    def errors(path):
        run = subprocess.run([*command, path], capture_output=True, text=True, cwd=ROOT)
        return [line for line in run.stdout.splitlines() if "error:" in line]

    assert errors(good) == []
    found = errors(bad)
    assert len(found) == len(WRONG)
    assert all(name in line for line, (_, name) in zip(found, WRONG, strict=True))

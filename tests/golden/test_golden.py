"""What must not change between versions: a saved run resumes under the same draws and the same controller.

After a change on purpose, write the files anew with ``HDET_REGENERATE=1 pytest tests/golden`` and say why.
"""

import json
import math
import os
from pathlib import Path

import pytest

from hdet.explore.spread import assignment
from hdet.steer.observation import ControllerState, Observation
from hdet.steer.published import Published

HERE = Path(__file__).parent
CONTROLLERS = {
    "default": Published(),
    "literal": Published(literal=True, temperature=0.05, decay=0.001, meta_lr=0.5),
    "all settings": Published(
        meta_lr=3.0, momentum=0.5, temperature=0.7, decay=0.1, bounds=(0.8, 1.3), warmup_rounds=0
    ),
}


def same(computed, name):
    file = HERE / f"{name}.json"
    if os.environ.get("HDET_REGENERATE"):
        file.write_text(json.dumps(computed, indent=1) + "\n")
    assert computed == json.loads(file.read_text())


def test_draws():
    draws = {
        f"{replicas} replicas, seed {seed}, {name}": [
            list(assignment(replicas, 1 / 9, seed=seed, round=k, hyperparameter=name)) for k in range(4)
        ]
        for replicas in (1, 2, 3, 8)
        for seed in (0, 1)
        for name in ("lr/0", "lr/1")
    }
    same(draws, "draws")


@pytest.mark.parametrize("name", CONTROLLERS)
def test_controller(name):
    """Thirty rounds of losses that first favour high rates, then low ones, with a NaN on the way; to 12 digits, since
    exp and log are the platform's."""
    state, path = ControllerState(), []
    for k in range(30):
        rho = assignment(4, 0.3, seed=0, round=k, hyperparameter="lr/0")
        lean = 1.0 if k < 18 else -1.0
        losses = [2.0 - 0.05 * k - 0.1 * lean * (m - 1) + 0.01 * math.sin(7 * k + r) for r, m in enumerate(rho)]
        if k == 10:
            losses[2] = math.nan
        state, slope = CONTROLLERS[name].update(state, Observation(tuple(losses), rho, 0.01 * math.cos(k / 25)))
        path.append([float(f"{x:.12g}") for x in (state.gain, state.velocity, slope if slope is not None else 0.0)])
    same(path, f"controller_{name.replace(' ', '_')}")

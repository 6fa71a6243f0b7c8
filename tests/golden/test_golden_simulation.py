"""The regret benchmark's simulated runs, bit for bit: final loss, gains and slopes."""

import dataclasses

import pytest
import torch
from golden_machine import TOLERANCE, Golden, digest

from hdet.bench.regret.simulation import Setting, simulate
from hdet.bench.regret.workloads import WORKLOADS
from hdet.steer import Posterior, Published

STEPS = 60
AMPLIFIED = 0.3
"""Of a net on a plateau at the start, where slopes are hardly more than rounding errors."""
POSTERIOR = {"controller": Posterior(), "keep_slopes": True, "rounds": 30}
PUBLISHED = {"controller": Published(warmup_rounds=1), "rounds": 20}
# name: workload, start in units of its tuned max_lr, setting
RUNS = {
    f"{workload}, {name}{', exact' if exact else ''}": (workload, 1.0, {**setting, "exact": exact})
    for workload in ("digits_mlp", "regression", "recommender")
    for name, setting in (("posterior", POSTERIOR), ("published", PUBLISHED))
    for exact in (False, True)
} | {
    "digits_conv, posterior": ("digits_conv", 1.0, POSTERIOR | {"replicas": 8, "spread": 0.3}),
    "digits_conv, literal": ("digits_conv", 1.0, {"controller": Published(literal=True), "rounds": 20}),
    "dropout, posterior": ("dropout", 1.0, POSTERIOR | {"power": 0.5, "probe_share": 2}),
    "digits_mlp, far too high": ("digits_mlp", 300.0, POSTERIOR),
    "regression, rollback": ("regression", 1000.0, POSTERIOR | {"exact": True}),
    "regression, no rollback": ("regression", 30.0, POSTERIOR | {"rollback": False}),
    "mixture/constant": ("mixture", 0.1, POSTERIOR | {"flat": True}),
    "digits_mlp, auto": ("digits_mlp", 0.01, POSTERIOR | {"auto": True, "find_steps": 4, "replicas": 8}),
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RUNS)
def test_simulation(name):
    workload, start, setting = RUNS[name]
    steps = 3 * STEPS if setting.get("auto") else STEPS
    schedule = "constant" if "constant" in name else "one_cycle"
    made = dataclasses.replace(WORKLOADS[workload], steps=steps, schedule=schedule)
    found = simulate(made, made.tuned * start, 0, Setting(**setting))
    details = dict(found.details)
    assert ("rollbacks" in details) == (", rollback" in name)
    Golden("simulation").check(
        name,
        exact={
            "loss": repr(found.loss),
            "gain": repr(found.gain),
            "gains": details["gains"],
            "slopes": digest([[progress, *slopes] for progress, slopes in details.get("slopes", ())]),
            "found": repr(details.get("found")),
        },
        plain={"spent": details.get("spent"), "rounds": len(details["gains"]), "rollbacks": details.get("rollbacks")},
        summary={"loss": found.loss, "gain": found.gain},
        tolerance=AMPLIFIED if workload == "digits_mlp" else TOLERANCE,
    )

"""Pure Python: schedules to the bit, and the names and defaults of what is public."""

import inspect

import pytest
from golden_machine import Golden

import hdet
from hdet import schedules

STEPS = 40
SCHEDULES = {
    "constant": schedules.constant(warmup_steps=5),
    "cosine": schedules.cosine(total_steps=STEPS, warmup_steps=5, final_factor=0.1),
    "infinite": schedules.infinite(
        cooldown_steps=15, constant_factor=0.4, warmup_steps=4, anneal_start=25, anneal_steps=10
    ),
    "infinite, inverse_sqrt": schedules.infinite(cooldown_steps=15, constant_factor=0.4, cooldown_type="inverse_sqrt"),
    "linear": schedules.linear(total_steps=STEPS, warmup_steps=3),
    "one_cycle": schedules.one_cycle(total_steps=STEPS),
    "power": schedules.power(batch_size=1024, sequence_length=4096, warmup_steps=6, decay_start=30, decay_steps=8),
    "rex": schedules.rex(total_steps=STEPS, warmup_steps=2),
    "uba": schedules.uba(total_steps=STEPS, phi=1.3),
} | {
    f"warmup_stable_decay, {kind}": schedules.warmup_stable_decay(
        total_steps=STEPS, decay_steps=12, warmup_steps=3, decay_type=kind, final_factor=0.05
    )
    for kind in ("sqrt", "linear", "cosine", "exponential")
}
PUBLIC = {
    "OneCycleLR": hdet.OneCycleLR,
    "Ensemble": hdet.Ensemble,
    "Probe": hdet.Probe,
    "param_group": hdet.param_group,
    "module_attribute": hdet.module_attribute,
    "scalar": hdet.scalar,
    "Posterior": hdet.controller.Posterior,
    "Published": hdet.controller.Published,
    "OneSlope": hdet.controller.OneSlope,
} | {f"schedules.{name}": getattr(schedules, name) for name in sorted(schedules.__all__)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    Golden("surface").check(name, plain={"factors": [SCHEDULES[name](step) for step in range(STEPS + 3)]})


def test_names_and_defaults():
    signatures = {
        name: [f"{p.name}, {p.kind.name}, {p.default!r}" for p in inspect.signature(public).parameters.values()]
        for name, public in PUBLIC.items()
    }
    signatures = {
        name: [row.replace(repr(inspect.Parameter.empty), "-") for row in rows] for name, rows in signatures.items()
    }
    Golden("surface").check("names and defaults", plain=signatures | {"hdet": sorted(hdet.__all__)})

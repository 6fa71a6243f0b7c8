"""Draws docs/overview.png from a finished demo: ``python docs/draw_overview.py runs/demo``.

Reads what ``launch/demo.sh`` leaves: the reports of the run with hdet, and the metrics of both runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from hdet import schedules
from hdet.monitor.base import read_jsonl

ROUNDS = 7
COLOURS = ["#2166ac", "#67a9cf", "#ef8a62", "#b2182b"]


def main(directory: Path) -> None:
    reports = [report for report in read_jsonl(directory / "hdet" / "rounds.jsonl") if report["complete"]]
    plain, ours = ([json.loads(line) for line in (directory / run / "metrics.jsonl").read_text().splitlines()]
                   for run in ("plain", "hdet"))  # fmt: skip
    summary = json.loads((directory / "hdet" / "summary.json").read_text())
    total, every, peak = summary["steps"], summary["converge_every"], summary["max_lr"]
    schedule = schedules.one_cycle(total_steps=total)

    figure, (fan, rate, loss) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for report in reports[:ROUNDS]:
        steps = list(range(report["round"] * every, (report["round"] + 1) * every))
        base = [schedule(step) * peak * report["gain"][0] for step in steps]
        fan.plot(steps, base, color="black", linewidth=1, linestyle="--")
        for replica, lr in enumerate(report["replica_lr"][0]):
            multiplier = lr / report["base_lr"][0]
            fan.plot(steps, [b * multiplier for b in base], color=COLOURS[replica % 4], linewidth=2)
        fan.axvline(steps[-1] + 1, color="#bbbbbb", linewidth=0.8)
    fan.set(title="Fan out, converge, move the base", xlabel="step", ylabel="learning rate")
    fan.legend(
        [*fan.lines[:1], *fan.lines[1:5]], ["base", *(f"replica {r}" for r in range(4))], frameon=False, fontsize=8
    )

    for run, label, colour in ((plain, "OneCycleLR", "#888888"), (ours, "hdet.OneCycleLR", "#b2182b")):
        training = [record for record in run if "lr" in record]
        rate.plot([r["step"] for r in training], [r["lr"] for r in training], label=label, color=colour)
        validation = [record for record in run if "val_loss" in record]
        loss.plot([r["step"] for r in validation], [r["val_loss"] for r in validation], label=label, color=colour)
    rate.set(title="Base learning rate", xlabel="step", yscale="log", ylim=(peak / 100, None))
    loss.set(title="Validation loss", xlabel="step")
    rate.legend(frameon=False, fontsize=8)
    loss.legend(frameon=False, fontsize=8)
    for axes in (fan, rate, loss):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("overview.png"), dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

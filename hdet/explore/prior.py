"""A prior: what one run found about gains and hyperparameters, as a small YAML file from which the next can start."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Prior:
    """Gains and centres to start from.

    Raises:
        ValueError: for a gain that is not finite and positive.
    """

    gains: dict[str, float]
    """By parameter group. The file lists them in increasing order."""
    hyperparameters: dict[str, float] = field(default_factory=dict)
    """The centre's value, by name."""

    def __post_init__(self) -> None:
        for name, gain in self.gains.items():
            if not (isinstance(gain, (int, float)) and 0 < gain < math.inf):
                raise ValueError(f"Invalid gain {gain!r} of group {name!r} in a prior. Must be finite and > 0.")
        for name, value in self.hyperparameters.items():
            if not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"Invalid value {value!r} of {name!r} in a prior. Must be finite.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
        content = {
            "gains": dict(sorted(self.gains.items(), key=lambda item: item[1])),
            "hyperparameters": dict(self.hyperparameters),
        }
        Path(path).write_text("# hdet prior 1\n" + yaml.safe_dump(content, sort_keys=False))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Prior:
        """Read a file that :meth:`save` wrote, or that was written by hand.

        Raises:
            ValueError: if it has other sections or values.
        """
        content = yaml.safe_load(Path(path).read_text())
        parts = {"gains", "hyperparameters"}
        if (
            not isinstance(content, dict)
            or not set(content) <= parts
            or not all(isinstance(part, dict) for part in content.values())
        ):
            raise ValueError(
                f"{os.fspath(path)} is no prior. It must have the sections gains: (group: gain) and hyperparameters: "
                "(name: value), as scheduler.ensemble.save_prior() writes them."
            )
        return Prior(content.get("gains", {}), content.get("hyperparameters", {}))

    def check(self, groups: Sequence[str], hyperparameters: Sequence[str], *, per_group: bool) -> None:
        """Raise ``ValueError`` unless it holds exactly these groups and hyperparameters."""
        if sorted(self.gains) != sorted(groups) or sorted(self.hyperparameters) != sorted(hyperparameters):
            raise ValueError(
                f"The prior has the groups {sorted(self.gains)} and hyperparameters {sorted(self.hyperparameters)}, "
                f"this run {sorted(groups)} and {sorted(hyperparameters)}."
            )
        if not per_group and len(set(self.gains.values())) > 1:
            raise ValueError(f"The prior has several gains, {self.gains}. Pass per_group=True to start from them.")

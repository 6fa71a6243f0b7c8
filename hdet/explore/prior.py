"""A prior: what one run found about gains and hyperparameters, as a small YAML file from which the next can start."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import yaml

from hdet import files


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
        for part, name in ((self.gains, "gains"), (self.hyperparameters, "hyperparameters")):
            if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
                raise ValueError(f"Invalid {name}={str(part)[:100]} in a prior. Must be a mapping of names to numbers.")
        for name, gain in self.gains.items():
            if not (_is_number(gain) and 0 < gain < math.inf):
                raise ValueError(
                    f"Invalid gain {str(gain)[:100]!r} of group {name!r} in a prior. Must be finite and > 0."
                )
        for name, value in self.hyperparameters.items():
            if not _is_number(value):
                raise ValueError(f"Invalid value {str(value)[:100]!r} of {name!r} in a prior. Must be finite.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, at once or not at all, and through no link.

        Raises:
            ValueError, OSError: as :func:`hdet.files.write_at_once`.
        """
        content = {
            "gains": dict(sorted(self.gains.items(), key=lambda item: item[1])),
            "hyperparameters": dict(self.hyperparameters),
        }
        text = "# hdet prior 1\n" + yaml.safe_dump(content, sort_keys=False)
        files.write_at_once(path, lambda file: file.write(text.encode()))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Prior:
        """Read a file that :meth:`save` wrote, or that was written by hand.

        Raises:
            ValueError: if it has other sections or values; the message names the file.
            OSError: if it is missing or may not be read.
        """
        content = files.read_yaml(path)
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
        try:
            return Prior(content.get("gains", {}), content.get("hyperparameters", {}))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def check(self, groups: Sequence[str], hyperparameters: Sequence[str], *, per_group: bool) -> None:
        """Raise ``ValueError`` unless it holds exactly these groups and hyperparameters."""
        if sorted(self.gains) != sorted(groups) or sorted(self.hyperparameters) != sorted(hyperparameters):
            raise ValueError(
                f"The prior has the groups {sorted(self.gains)} and hyperparameters {sorted(self.hyperparameters)}, "
                f"this run {sorted(groups)} and {sorted(hyperparameters)}."
            )
        if not per_group and len(set(self.gains.values())) > 1:
            raise ValueError(f"The prior has several gains, {self.gains}. Pass per_group=True to start from them.")


def _is_number(value: object) -> bool:
    """A finite one. A bool is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False

"""A prior: what one run found about gains and hyperparameters, as a small YAML file from which the next can start."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import yaml

from hdet import files
from hdet.errors import (
    check_field,
    check_flag,
    check_gain,
    check_list,
    check_mapping,
    check_number,
    check_path,
    check_text,
)


def _numbers(name: str, values: object, check: Callable[[str, object], float], what: str) -> dict[str, float]:
    checked = {}
    for key, value in check_mapping(name, values, "a mapping of names to numbers").items():
        check_text(f"a name in {name}", key)
        checked[key] = check(f"{what} {key!r}", value)
    return checked


@dataclass(frozen=True)
class Prior:
    """Gains and centres to start from.

    Raises:
        TypeError, ValueError: for a name that is no str, a gain that is not finite and positive, a value that is not
            finite.
    """

    gains: dict[str, float]
    """By parameter group. The file lists them in increasing order."""
    hyperparameters: dict[str, float] = field(default_factory=dict)
    """The centre's value, by name."""

    def __post_init__(self) -> None:
        check_field(self, "gains", _numbers, check_gain, "gain of group")
        check_field(self, "hyperparameters", _numbers, check_number, "value of")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, at once or not at all, and through no link.

        Raises:
            ValueError, OSError: as :func:`hdet.files.write_at_once`.
        """
        path = check_path("path", path)
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
            TypeError, ValueError: if it cannot be read, or has other sections or values; the message names the file.
        """
        path = check_path("prior", path, "the path of a file that save_prior() wrote")
        form = (
            "It must have the sections gains: (group: gain) and hyperparameters: (name: value), as "
            "scheduler.ensemble.save_prior() writes them."
        )
        try:
            content = files.read_yaml(path)
        except OSError as error:
            raise ValueError(f"Cannot read the prior {path}: {error.strerror}. {form}") from error
        parts = {"gains", "hyperparameters"}
        if (
            not isinstance(content, dict)
            or not set(content) <= parts
            or not all(isinstance(part, dict) for part in content.values())
        ):
            raise ValueError(f"{path} is no prior. {form}")
        try:
            return Prior(content.get("gains", {}), content.get("hyperparameters", {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no prior. {error}") from error

    def check(self, groups: Sequence[str], hyperparameters: Sequence[str], *, per_group: bool) -> None:
        """Raise ``ValueError`` unless it holds exactly these groups and hyperparameters."""
        for name, given in (("groups", groups), ("hyperparameters", hyperparameters)):
            for one in check_list(name, given, "a list of names"):
                check_text(name, one, "a list of names")
        check_flag("per_group", per_group)
        if sorted(self.gains) != sorted(groups) or sorted(self.hyperparameters) != sorted(hyperparameters):
            raise ValueError(
                f"The prior has the groups {sorted(self.gains)} and hyperparameters {sorted(self.hyperparameters)}, "
                f"this run {sorted(groups)} and {sorted(hyperparameters)}."
            )
        if not per_group and len(set(self.gains.values())) > 1:
            raise ValueError(f"The prior has several gains, {self.gains}. Pass per_group=True to start from them.")

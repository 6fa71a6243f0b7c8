"""The result of one training run of the regret benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """The result of a run."""

    loss: float
    """Final validation loss, in eval mode. Not finite if the run diverged."""
    seconds: float
    gain: float = 1.0
    """The controller's, at the end."""
    details: Mapping[str, Any] = {}
    """Anything else worth keeping, as JSON can hold it."""

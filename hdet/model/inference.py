"""Converging inside ``torch.inference_mode()``, as evaluation loops do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_inference(function: Function) -> Function:
    """Let a function run as under ``torch.no_grad()`` where it is called in inference mode: what it makes there and
    keeps could not be written in training."""

    @functools.wraps(function)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **keywords)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **keywords)

    return wrapped  # type: ignore[return-value]

"""Checks of what names a device or a dtype."""

from __future__ import annotations

from typing import Any

import torch

from hdet.errors import check_instance, shown


def check_device(name: str, value: Any, rule: str = "a device such as 'cpu'") -> Any:
    """``value``, if tensors can be kept on the device that it names.

    Raises:
        TypeError, ValueError: if not.
    """
    check_instance(name, value, (str, torch.device), rule)
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except Exception as error:  # torch's own are RuntimeError, AssertionError and NotImplementedError, by device
        raise ValueError(f"Invalid {name}={shown(value)}. Must be {rule}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError(f"Invalid {name}={shown(value)}. Must be {rule}: what is on the meta device holds no values.")
    return value


def check_float_dtype(name: str, value: Any) -> torch.dtype:
    """``value``, if it is a floating-point dtype in which torch computes."""
    rule = "a floating-point dtype such as torch.float32 or torch.bfloat16"
    check_instance(name, value, torch.dtype, rule)
    if value not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"Invalid {name}={value}. Must be {rule}.")
    return value

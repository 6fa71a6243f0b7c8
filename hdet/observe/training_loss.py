"""The training losses of a round."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor


class TrainingLoss:
    """Sums a replica's training losses over a round without waiting for the device.

    A loss on a device is added there, in float64 where the device has it. :meth:`total` reads the sum, once per round.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again at 0."""
        self._host = 0.0
        self._device: Tensor | None = None
        self.count = 0

    def add(self, loss: float | Tensor) -> None:
        """Add one step's loss, as returned by :func:`check_loss`."""
        self.count += 1
        if isinstance(loss, float):
            self._host += loss
            return
        if self._device is None or self._device.device != loss.device:
            self._host, self._device = self._sum(), _zero_on(loss.device)
        self._device.add_(loss)

    def total(self) -> tuple[float, int]:
        """(sum of the losses, number of them). Waits for the device."""
        return self._sum(), self.count

    def _sum(self) -> float:
        return self._host + (0.0 if self._device is None else float(self._device))


def check_loss(loss: object) -> float | Tensor:
    """The loss of one step as a float or, where reading it would wait for a device, a detached 0-dim tensor there.

    A non-finite loss passes: it makes the replica's mean loss of the round non-finite, which the controller ignores.

    Raises:
        TypeError: for an int, a bool, an integer tensor, a complex tensor, or anything that is not a number.
        ValueError: for a tensor of more than one element.
    """
    if type(loss) is float:
        return loss
    if type(loss) is Tensor or isinstance(loss, Tensor):
        if loss.is_cpu:
            try:
                if type(value := loss.item()) is float:
                    return value
            except RuntimeError:
                pass  # more than one element, or none: refused below
        if not loss.is_floating_point() or loss.is_meta or loss.layout != torch.strided:
            what = "on the meta device" if loss.is_meta else f"of layout {loss.layout}"
            if loss.is_floating_point():
                raise TypeError(f"scheduler.step(loss) got a tensor {what}; a loss has a value that can be read.")
            raise TypeError(
                f"scheduler.step(loss) got a tensor of dtype {loss.dtype}; a loss is a floating-point scalar."
            )
        if loss.numel() != 1:
            raise ValueError(
                f"scheduler.step(loss) got a tensor of shape {tuple(loss.shape)}; pass the scalar on which backward() "
                "was called, for example loss.mean()."
            )
        return loss.detach().reshape(())
    if isinstance(loss, numbers.Integral):
        raise TypeError(
            f"scheduler.step(loss) got the int {loss!r}; a loss is a float or a tensor. To set the step of the "
            "schedule as torch's deprecated step(epoch) did, pass epoch= by name. (DeepSpeed's engine passes its batch "
            "size when a scheduler's step() fails: look for the first error.)"
        )
    if isinstance(loss, numbers.Real):
        try:
            return float(loss)
        except OverflowError:
            return math.inf if bool(loss > type(loss)(0)) else -math.inf  # type: ignore[call-arg]
    raise TypeError(f"scheduler.step(loss) got {type(loss).__name__}; a loss is a float or a scalar tensor.")


def mean_losses(totals: list[tuple[float, int]]) -> tuple[float, ...]:
    """[replica] mean loss, from [replica] (sum, count); NaN for a replica that reported none."""
    return tuple(total / count if count else math.nan for total, count in totals)


def finite_mean(losses: Sequence[float]) -> float:
    """Mean of the finite ``losses``; NaN if there are none."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return math.nan
    try:
        return math.fsum(finite) / len(finite)
    except OverflowError:
        return math.fsum(loss / len(finite) for loss in finite)


def _zero_on(device: torch.device) -> Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    return torch.zeros((), dtype=dtype, device=device)

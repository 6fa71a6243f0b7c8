"""Settings that belong together, each group one argument."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from hdet.errors import check_choice, check_field, check_instance, check_number, check_whole
from hdet.explore.design import Design
from hdet.steer.one_slope import OneSlope

_OPTIMIZER_STATES = ("auto", "verify", "average", "keep", "reset")
_WIRE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
_DESIGNS = ("orthogonal", "independent")


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """How the replicas are averaged: ``averaging=hdet.Averaging(...)``.

    Raises:
        TypeError, ValueError: for a bad value.
    """

    bucket_mib: float = 64.0
    """Size of a communication bucket in MiB, > 0."""
    overlap_steps: int = 0
    """``tau``, in [0, ``converge_every``). With ``tau > 0`` the all-reduce at a round's end runs behind the next
    ``tau`` steps: a snapshot is sent at step ``kT``, and ``theta += mean(snapshot) - snapshot`` applied at ``kT +
    tau``. That takes out all divergence up to ``kT`` and keeps what each replica has done since, so replicas are equal
    only after ``converge()``. It takes memory for two copies of the model in fp32 meanwhile."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """In what trainable parameters travel. ``bfloat16``: as differences from the last converged mean, in half the
    bytes, with a copy of that mean in fp32 (:mod:`hdet.converge.delta`). The mean, the same on all replicas, is then
    off by at most about ``(N + 3) / 2 * 2**-9`` of the largest distance that a parameter has moved since. The first
    converge, and the first after a rollback or a resume, travels in fp32, so that a resumed run is not the
    uninterrupted one bit for bit. fp64, buffers and optimizer state travel as they are. It pays where the network is
    what a converge waits for. Not with ``overlap_steps``."""
    optimizer_state: Literal["auto", "verify", "average", "keep", "reset"] = "auto"
    """What a converge does with the optimizer's state: ``verify`` that it agrees, by a fingerprint that reads all of it
    in the first three converges and every 32nd after; ``average`` it, in fp32 and in place; ``keep`` each replica's
    own; ``reset`` it at a round's end. ``auto`` verifies where gradients are shared and the optimizer makes its state
    of them alone, and averages elsewhere (docs/optimizer_state.md)."""

    def __post_init__(self) -> None:
        check_field(self, "bucket_mib", check_number, "> 0 MiB, and at most 2**20", lambda mib: 0 < mib <= 2**20)
        check_field(self, "overlap_steps", check_whole, ">= 0 steps", lambda steps: steps >= 0)
        check_field(self, "wire_dtype", check_choice, list(_WIRE_DTYPES))
        check_field(self, "optimizer_state", check_choice, _OPTIMIZER_STATES)
        if self.optimizer_state == "average" and self.overlap_steps:
            raise ValueError(
                f'optimizer_state="average" and overlap_steps={self.overlap_steps} exclude one another: moments cannot '
                'be corrected late. Pass "auto", which averages them in converge() only, or "keep" or "reset".'
            )
        if self.wire_dtype != "float32" and self.overlap_steps:
            raise ValueError(
                f"wire_dtype={self.wire_dtype} and overlap_steps={self.overlap_steps} exclude one another: replicas "
                "send how far they moved since they were equal, and with overlap they never are."
            )

    @property
    def bucket_bytes(self) -> int:
        """Size of a communication bucket in bytes."""
        return int(self.bucket_mib * 2**20)

    @property
    def low_precision(self) -> torch.dtype | None:
        """The dtype of differences on the wire; ``None`` where parameters travel as they are."""
        return _WIRE_DTYPES[self.wire_dtype]


@dataclass(frozen=True, kw_only=True)
class Outer:
    """The outer optimizer of local gradients, which moves the replicas' mean (:mod:`hdet.converge.outer`):
    ``outer=hdet.Outer(...)``. The default is the plain average.

    Raises:
        TypeError, ValueError: for a bad value.
    """

    momentum: float = 0.0
    """``mu``, in [0, 1): Nesterov momentum on what a whole round has done. It takes memory for two copies of the
    parameters."""
    lr: float = 1.0
    """``nu``, > 0: the share of the way to the mean that is gone."""

    def __post_init__(self) -> None:
        check_field(self, "momentum", check_number, "in [0, 1)", lambda momentum: 0 <= momentum < 1, prefix="outer.")
        check_field(
            self, "lr", check_number, "> 0; 1 goes all the way to the average", lambda lr: lr > 0, prefix="outer."
        )

    @property
    def is_plain(self) -> bool:
        """Whether it does no more than average."""
        return self.momentum == 0 and self.lr == 1


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """How hyperparameters beside the learning rate are told apart: ``exploration=hdet.Exploration(...)``.

    Raises:
        TypeError, ValueError: for a bad value.
    """

    design: Design = "orthogonal"
    """With several factors (groups' learning rates, hyperparameters), how levels are assigned to replicas:
    ``orthogonal``, so that one round tells their effects apart, or ``independent``, as in the paper."""
    controller: OneSlope = field(default_factory=OneSlope)
    """How the centres of ``hyperparameters`` move."""

    def __post_init__(self) -> None:
        check_field(self, "design", check_choice, _DESIGNS, prefix="exploration.")
        rule = "an instance of hdet.controller.OneSlope"
        check_field(self, "controller", check_instance, OneSlope, rule, prefix="exploration.")

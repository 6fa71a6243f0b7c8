"""Which tensors are finite, where some hold infinities on purpose.

A buffer may be infinite by design: a mask of ``-inf``, the ``inf`` with which an observer of minima begins. What a
tensor holds before training is its design. Infinities, and NaN, in a tensor that had none are a blow-up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hdet.converge.state_entries import is_plain
from hdet.model.fingerprint import SMALL
from hdet.model.finite import all_finite, is_float, wide
from hdet.model.weights import local


class Design:
    """What untrained tensors may hold, by their position among the tensors of a model.

    A tensor may hold infinities, or NaN, if it held some when the run was built. One that has another shape since, or
    that was not there, may hold infinities if it does when it is first seen.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[torch.Size, bool, bool]] | None = None
        self._hashes: tuple[list[int], list[int]] = ([], [])

    def look(self, kinds: Sequence[tuple[Tensor, bool]]) -> None:
        """Take notice of tensors, each with whether it is trained, that are new or have another shape."""
        if self._seen is not None and len(self._seen) == len(kinds):
            changed = [i for i, (t, _) in enumerate(kinds) if not is_lazy(t) and t.shape != self._seen[i][0]]
        else:
            changed = list(range(len(kinds)))
        is_first = self._seen is None
        seen = list(self._seen or ())[: len(kinds)]
        seen += [(torch.Size([-1]), False, False)] * (len(kinds) - len(seen))
        for i in changed:
            tensor, trained = kinds[i]
            if is_lazy(tensor) or tensor.is_meta:
                continue  # it has no values yet
            infinite = nan = False
            if not trained and tensor.numel() and is_float(tensor) and not all_finite([tensor]):
                values = wide(tensor)
                infinite, nan = bool(values.isinf().any()), is_first and bool(values.isnan().any())
            seen[i] = (tensor.shape, infinite, nan)
        self._seen = seen

    def is_infinite(self, position: int) -> bool:
        """Whether the tensor may hold infinities."""
        return self._seen is not None and (self._seen[position][1] or self._seen[position][2])

    def allows(self, position: int, tensor: Tensor) -> bool:
        """Whether the tensor is as finite as it must be."""
        if not is_float(tensor) or all_finite([tensor]):
            return True
        if not self.is_infinite(position):
            return False
        assert self._seen is not None
        _, infinite, nan = self._seen[position]
        values = wide(tensor)
        return (nan or not bool(values.isnan().any())) and (infinite or not bool(values.isinf().any()))

    def allows_all(self, tensors: Sequence[tuple[int, Tensor]], hashes: Sequence[int] = ()) -> bool:
        """Whether all are as finite as they must be.

        Args:
            tensors: each with its position.
            hashes: of the tensors' bits, as :func:`hdet.model.fingerprint.fingerprint_all` returns them. A large tensor
                whose hash is that of the last call, which found all as they must be, is not read again.
        """
        positions, known = self._hashes
        large = [(i, t) for i, t in tensors if t.nbytes > SMALL]
        read = [(i, t) for i, t in tensors if t.nbytes <= SMALL]
        if not hashes or [i for i, _ in tensors] != positions or len(known) != len(hashes):
            read = list(tensors)
        else:
            if known[len(large) :] == list(hashes[len(large) :]):
                read = []
            read += [tensor for tensor, old, new in zip(large, known, hashes, strict=False) if old != new]
        plain = [t for i, t in read if is_float(t) and not self.is_infinite(i)]
        good = all_finite(plain) and all(self.allows(i, t) for i, t in read if self.is_infinite(i))
        if hashes:
            self._hashes = ([i for i, _ in tensors], list(hashes)) if good else ([], [])
        return good


class StateDesign:
    """What an optimizer's state may hold. torch's optimizers hold nothing infinite on purpose. Of another, the values
    under a key are infinite by design if, when they are first seen, all of them are infinite, and none is NaN. A Python
    number that is not finite then may hold anything.

    Args:
        is_torch: whether the optimizer is one of torch's.
    """

    def __init__(self, *, is_torch: bool) -> None:
        self._is_torch = is_torch
        self._infinite: dict[object, bool] = {}

    def allows(self, values: Sequence[tuple[object, Any]]) -> bool:
        """Whether all values, each with the keys that lead to it, are as finite as they must be."""
        if not self._is_torch:
            self._look(values)
        floats = [x for path, x in values if not self._infinite.get(path)]
        tensors = [local(x) for x in floats if isinstance(x, Tensor)]
        if any(isinstance(x, float) and not math.isfinite(x) for x in floats):
            return False
        if not all_finite(t for t in tensors if t.numel() and is_plain(t)):
            return False
        return not any(_has_nan(x) for path, x in values if self._infinite.get(path))

    def _look(self, values: Sequence[tuple[object, Any]]) -> None:
        new: dict[object, bool] = {}
        for path, x in values:
            if path not in self._infinite:
                new[path] = new.get(path, True) and _is_infinite(x)
        self._infinite |= new


def _is_infinite(x: object) -> bool:
    if isinstance(x, Tensor):
        shard = local(x)
        return bool(is_plain(shard) and is_float(shard) and shard.numel() and wide(shard).isinf().all())
    return isinstance(x, float) and not math.isfinite(x)


def _has_nan(x: object) -> bool:
    return isinstance(x, Tensor) and bool(wide(local(x)).isnan().any())

"""A method that an optimizer calls before its next step."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakMethod

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class BeforeStep:
    """Calls ``method`` before each step of the optimizer, while it is armed.

    The method may disarm it. The hook stays in the optimizer until :meth:`remove`: an optimizer must not lose one while
    it goes through them. It refers to the method's owner weakly.

    Args:
        optimizer: gets the hook the first time this is armed.
        method: a bound method without arguments.
    """

    def __init__(self, optimizer: Optimizer, method: Callable[[], None]) -> None:
        self._optimizer, self._method = optimizer, WeakMethod(method)
        self._handle: RemovableHandle | None = None
        self.is_armed = False
        """Whether the method will be called."""

    def arm(self) -> None:
        """Call the method before the next step."""
        self.is_armed = True
        if self._handle is not None:
            return

        def before_step(*_: object) -> None:
            if self.is_armed and (method := self._method()) is not None:
                method()

        self._handle = self._optimizer.register_step_pre_hook(before_step)

    def disarm(self) -> None:
        """Do not call it."""
        self.is_armed = False

    def remove(self) -> None:
        """Take the hook out of the optimizer. Not to be called from the method."""
        self.is_armed = False
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

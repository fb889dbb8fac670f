"""Methods that are put on one instance, and whether other tools have put something there."""

import functools
import inspect
from typing import Any

from torch import nn


class BoundMethod(functools.partial):
    """`BoundMethod(_router_forward, router)`: an instance attribute that tools can read as they read the bound method
    `forward`, the last word of the function's name.

    A real one would be bound to the stock class's forward after a pickle, which keeps of a method its name alone; a
    partial is copied and pickled with its module.
    """

    @property
    def __self__(self) -> Any:
        return self.args[0]

    @property
    def __func__(self) -> Any:
        return self.func

    @property
    def __wrapped__(self) -> Any:  # where `inspect.getsource` looks
        return self.func

    @property
    def __name__(self) -> str:
        return self.func.__name__.rpartition("_")[2]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.args[0]), self.__name__).__get__(self.args[0]))


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling `module` does what its class's forward does, and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )

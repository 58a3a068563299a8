"""A class whose instances have code of their own for ``forward``, as torch.compile limits recompilations by code."""

from types import FunctionType
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def own_code_each(kind: type[M]) -> type[M]:
    """Make every instance of `kind`, in place, one of a subclass of the same name with a copy of its forward.

    Modules that run graphs differ in the classes of these, which ``torch.compile`` guards on: with one code for all it
    would recompile at each module, and refuse the ninth of a process.
    """

    def new(cls: Any, *_: Any, **__: Any) -> Any:
        run = cls.forward
        own = FunctionType(run.__code__.replace(), run.__globals__, "forward", None, run.__closure__)
        own.__annotations__ = run.__annotations__
        return object.__new__(type(cls.__name__, (cls,), {"forward": own, "__module__": cls.__module__}))

    kind.__new__ = new
    return kind

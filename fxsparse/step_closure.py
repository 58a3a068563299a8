"""A closure of ``optimizer.step`` that goes on with the mask update."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxsparse.errors import UnsupportedError


@dataclass
class Once:
    """A closure of ``optimizer.step`` on the step of an update, and what is to follow its backward."""

    closure: Callable[[], Any]
    then: Callable[[], None]
    optimizer: str
    called: bool = False

    def __call__(self) -> Any:
        if self.called:
            raise UnsupportedError(
                f"{self.optimizer} calls the closure of step() more than once, and masks move after the first call: "
                "expected an optimizer that needs one gradient for a step. Use one such as SGD or AdamW, or a method "
                "whose masks stay (static)."
            )
        self.called = True
        loss = self.closure()
        self.then()
        return loss

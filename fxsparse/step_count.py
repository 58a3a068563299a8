"""How many optimizer steps counted, where GradScaler keeps it on the device whether one did."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StepCount:
    """Steps that are known to have counted, and how many more may have; nothing is read until somebody asks."""

    known: int = 0
    waiting: int = 0
    """Steps of which only the device knows whether they counted."""
    counted: Tensor | None = None
    """How many of them did, on the device."""

    def wait(self, found_inf: Tensor) -> Tensor:
        """Take in a step that counts if this is 0; returns 1 or 0 on its device, int64 scalar."""
        one = (found_inf.detach() == 0).to(torch.int64).reshape(())
        self.waiting += 1
        self.counted = one if self.counted is None else self.counted + one
        return one

    def read(self) -> int:
        """All steps that counted; waits for the device where one is not known yet."""
        if self.counted is not None:
            self.known += int(self.counted)
            self.waiting, self.counted = 0, None
        return self.known

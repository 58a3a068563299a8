"""What the tests of the backend share: kernels win by decree, and aot_eager stands in for Inductor."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from fxsparse import choosing, inference, kernel
from fxsparse.backend import entry
from fxsparse.choosing import Choice
from fxsparse.inference import Speed


@pytest.fixture(autouse=True)
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """CSR is faster wherever there are zeros, and so are kernels without Inductor."""

    def choose(problem, x, weight, bias=None, activation="none", **options) -> Choice:
        end = "" if problem.op == "linear" else "-conv"
        times = {f"dense{end}": 11.0, f"cpu-csr{end}": 10.0}
        return Choice(kernel.registered()[f"cpu-csr{end}"], times, {}, "measured")

    torch._dynamo.reset()
    entry._REPORTS.clear()
    monkeypatch.setattr(choosing, "choose", choose)
    monkeypatch.setattr(inference, "speed_of", lambda *call: Speed(200.0, 100.0, 2.0))
    monkeypatch.setattr(
        entry, "times_us", lambda calls, arguments: {n: float(n != "on kernels") for n in calls}
    )
    aot = lookup_backend("aot_eager")
    monkeypatch.setattr(entry, "by_inductor", lambda gm, inputs, settings: aot(gm, list(inputs)))


@pytest.fixture
def net() -> nn.Module:
    """A pruned network in evaluation mode."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    return prune_(model)


def prune_(model: nn.Module, keep: float = 0.2) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand_like(parameter) < keep)
    return model

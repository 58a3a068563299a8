import pytest

from fxsparse import choosing
from fxsparse.kernels import cpu


@pytest.fixture
def instruction_set():
    """Chooses the kernels' instruction set; afterwards it is as before."""
    before = cpu.instruction_set()
    yield cpu.instruction_set
    if before != "reference":
        cpu.instruction_set(before)


@pytest.fixture
def fastest(monkeypatch):
    """Lets the kernel of a name win wherever it can run, whatever earlier processes measured."""

    def wins(winner):
        monkeypatch.setattr(
            choosing, "interleaved_quartiles", lambda timers, **_: {n: 1.0 + (n != winner) for n in timers}
        )
        monkeypatch.setattr(choosing, "_CHOICES", {})
        monkeypatch.setattr(choosing.machine, "recall", lambda key: None)
        monkeypatch.setattr(choosing.machine, "remember", lambda key, value: None)

    return wins

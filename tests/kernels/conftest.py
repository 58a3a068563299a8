import pytest

from fxsparse.kernels import cpu


@pytest.fixture
def instruction_set():
    """Chooses the kernels' instruction set; afterwards it is as before."""
    before = cpu.instruction_set()
    yield cpu.instruction_set
    if before != "reference":
        cpu.instruction_set(before)

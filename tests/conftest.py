"""What every test starts from: one thread, a fixed seed, and reproducible hypothesis examples."""

import os

# Before torch is imported: idle OpenMP and inductor workers fight over a small machine's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from itertools import count

import hypothesis
import pytest
import torch

from fxsparse import machine
from fxsparse.kernels import cpu

torch.set_num_threads(1)
# The first example of a torch function may take seconds, so a deadline measures the machine and not the code.
hypothesis.settings.register_profile("fxsparse", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fxsparse")


_TESTS = count()


def pytest_configure(config: pytest.Config) -> None:
    """Build the C++ kernels before workers start (``-n``), as each would build them."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        cpu.load()


@pytest.fixture(autouse=True)
def _measured_anew(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what another one measured."""
    folder = tmp_path_factory.getbasetemp() / f"measured{next(_TESTS)}"
    monkeypatch.setattr(machine, "measured_folder", lambda: folder)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

"""What `capabilities` says of the kernels of this machine."""

import pytest
import torch

from fxsparse.kernel import capabilities
from fxsparse.kernels import cpu


@pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))
def test_capabilities_are_those_of_layers_that_suit_the_kernel(instruction_set):
    rows = {row["kernel"]: row["available"] for row in capabilities()}
    assert {rows[name] for name in ("cpu-bsr", "cpu-nm", "cpu-csr", "cpu-csr-conv", "cpu-depthwise")} == {
        "yes"
    }
    if not torch.cuda.is_available():
        assert {why.split("; ")[-1] for name, why in rows.items() if name.startswith("cuda")} == {
            "there is no GPU here"
        }
    instruction_set("avx2")
    rows = {row["kernel"]: row["available"] for row in capabilities()}
    assert rows["cpu-lookup"] == "it needs AVX-512 VBMI"


def test_capabilities_say_what_is_not_installed(monkeypatch):
    from fxsparse.kernels.gpu import needs

    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)
    rows = {row["kernel"]: row["available"] for row in capabilities()}
    assert "it needs Triton, which is not installed" in rows["cuda-csr"]

"""Every shipped kernel against the contract of fxsparse.testing, on every instruction set of this machine."""

import pytest
import torch

from fxsparse import testing
from fxsparse.kernel import registered
from fxsparse.kernels import cpu
from fxsparse.kernels.cpu.build import INSTRUCTION_SETS

COMPILED = ("cpu-csr", "cpu-csr-train", "cpu-condensed", "cpu-striped")
COMPILED += ("cpu-csr-conv", "cpu-csr-conv-train")


@pytest.fixture
def instruction_set():
    before = cpu.instruction_set()
    yield cpu.instruction_set
    if before != "reference":
        cpu.instruction_set(before)


@pytest.mark.parametrize("name", ["dense", "dense-masked", "dense-conv", "dense-conv-masked"])
def test_dense_kernels_fulfil_the_contract(name):
    testing.check_kernel(registered()[name])


@pytest.mark.parametrize("level", INSTRUCTION_SETS[:-1])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_kernels_fulfil_the_contract(name, level, instruction_set):
    if (reason := cpu.availability()) is not None:
        pytest.skip(reason)
    if instruction_set(level) != level:
        pytest.skip(f"this CPU has no {level}")
    testing.check_kernel(registered()[name])


def test_lookups_fulfil_the_contract(instruction_set):
    if instruction_set("avx512vbmi") != "avx512vbmi":
        pytest.skip("this CPU has no AVX-512 VBMI")
    testing.check_kernel(registered()["cpu-lookup"])


def test_the_contract_catches_a_wrong_result_and_an_unwritten_entry():
    from dataclasses import replace

    dense = registered()["dense"]
    wrong = replace(
        dense, run=lambda x, bias, w, activation="none": dense.run(x, bias, w * 1.001, activation)
    )
    with pytest.raises(AssertionError, match="relative error"):
        testing.check_kernel(wrong)
    unwritten = replace(dense, run=lambda x, bias, w, activation="none": x.new_empty(*x.shape[:-1], len(w)))
    with pytest.raises(AssertionError, match="finite"):
        testing.check_kernel(unwritten)


def test_compiled_ops_see_poisoned_memory():
    with testing.poisoned_memory():
        assert torch.empty(3).isnan().all()

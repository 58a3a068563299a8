import pytest
import torch

from fxsparse import machine
from fxsparse.kernels import cpu
from fxsparse.kernels.cpu.build import INSTRUCTION_SETS

COMPILED = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))
LANES = {"portable": 4, "avx2": 8, "avx512": 16, "avx512vbmi": 16, "avx512bf16": 16}


@COMPILED
@pytest.mark.parametrize("level", INSTRUCTION_SETS)
def test_the_loops_do_what_they_count(level):
    before = cpu.instruction_set()
    try:
        if cpu.instruction_set(level) != level:
            pytest.skip(f"this CPU has no {level}")
        sums = 16 if LANES[level] == 16 else 12
        assert torch.ops.fxsparse.cpu_multiply_adds(7) == 7 * 2 * LANES[level] * sums
        data = torch.arange(4096.0)
        assert torch.ops.fxsparse.cpu_read(data, 3) == 3 * data.sum()
        assert cpu.flops_per_second() > 0
        assert cpu.bytes_per_second(1 << 14) > 0
    finally:
        cpu.instruction_set(before)


@COMPILED
def test_every_thread_computes_and_reads_its_share():
    before = torch.get_num_threads()
    one = torch.ops.fxsparse.cpu_multiply_adds(5)
    torch.set_num_threads(2)
    try:
        assert torch.ops.fxsparse.cpu_multiply_adds(5) == 2 * one
        assert torch.ops.fxsparse.cpu_read(torch.ones(4096), 1) == 4096
    finally:
        torch.set_num_threads(before)


@COMPILED
def test_rates_are_of_all_that_was_done(monkeypatch):
    keys = []

    def half_a_second(key, prepare):
        prepare()()
        keys.append(key)
        return 0.5

    monkeypatch.setattr(machine, "least_seconds", half_a_second)
    assert cpu.flops_per_second() == 2 * torch.ops.fxsparse.cpu_multiply_adds(20_000)
    assert cpu.bytes_per_second(1 << 14) == 2 * (1 << 21)
    assert cpu.bytes_per_second(1 << 22) == 2 * (1 << 22)
    assert all(cpu.version() in key and torch.get_num_threads() in key for key in keys)


def test_without_the_kernels_there_is_no_rate(monkeypatch):
    monkeypatch.setattr(cpu.roofs, "load", lambda: False)
    assert cpu.flops_per_second() == cpu.bytes_per_second(1 << 20) == 0.0

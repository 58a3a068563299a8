import pytest
import torch

from fxsparse import choosing, machine
from fxsparse.kernel import Problem, registered
from fxsparse.kernels import gpu
from fxsparse.kernels.gpu import device, roofs


def test_roofs_are_measured_once_by_the_clock_of_the_device(monkeypatch, tmp_path):
    monkeypatch.setenv("FXSPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "_SECONDS", {})
    calls = []

    def seconds(call, device, calls_in_a_row=None, **_):
        calls.append(call())
        return 1e-3

    monkeypatch.setattr(roofs, "seconds", seconds)
    cpu = torch.device("cpu")
    assert roofs.flops_per_second(torch.float32, cpu) == pytest.approx(2 * 256**3 / 1e-3)
    assert roofs.bytes_per_second(1 << 10, cpu) == pytest.approx(
        (1 << 25) / 1e-3
    )  # too few to be told from a launch
    assert len(calls) == 40
    assert roofs.bytes_per_second(1 << 20, cpu) == pytest.approx((1 << 25) / 1e-3)
    assert len(calls) == 40
    assert calls[0].shape == (256, 256)
    assert float(calls[-1]) == (1 << 25) / 4


def test_the_limit_on_a_gpu_is_that_of_the_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "flops_per_second", lambda dtype, device: 1e12)
    monkeypatch.setattr(gpu, "bytes_per_second", lambda size, device: 1e9)
    entry = registered()["cuda-csr"]
    cuda = torch.device("cuda", 0)
    few = Problem("linear", (64, 64), 1, 400, torch.float32, cuda, training=False)
    cost = entry.cost(few)
    assert choosing.limit_us(entry, few) == pytest.approx(1e6 * cost.bytes / 1e9)
    many = Problem("linear", (64, 64), 10**6, 400, torch.float32, cuda, training=False)
    assert choosing.limit_us(entry, many) == pytest.approx(1e6 * entry.cost(many).flops / 1e12)


def test_a_clock_counts_calls_after_one_that_does_not_count():
    calls = []
    assert device.seconds(lambda: calls.append(0), torch.device("cpu"), calls=3) > 0
    assert len(calls) == 4
    assert device.name_of(torch.device("cpu")) == "cpu"


@pytest.mark.gpu
def test_a_gpu_reaches_more_than_a_processor_and_less_than_is_possible():
    cuda = torch.device("cuda", torch.cuda.current_device())
    assert 1e13 < gpu.flops_per_second(torch.bfloat16, cuda) < 1e16
    assert 1e11 < gpu.bytes_per_second(1 << 30, cuda) < 5e13

"""Launches of GPU kernels, measured by a clock that the tests hold."""

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fxsparse.kernels.gpu import tuning

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
pytest.importorskip("triton")


@dataclass(frozen=True)
class Launch:
    warps: int


LAUNCHES = (Launch(4), Launch(8), Launch(2))
SECONDS = {4: 3.0e-3, 8: 1.0e-3, 2: 2.0e-3}


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """What was run, in order; the times are those of SECONDS, and nothing is known before."""
    monkeypatch.setenv("FXSPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_TAKEN", {})
    ran = []

    def seconds(call, device, calls):
        call()
        return SECONDS[ran[-1].warps]

    monkeypatch.setattr(tuning, "seconds", seconds)
    return ran


def take(ran, sizes=(1,), launches=LAUNCHES):
    return tuning.fastest("fxsparse.kernels.gpu.tuning", sizes, lambda: launches, ran.append, CPU)


def test_nothing_is_run_before_somebody_may_measure(clock):
    assert take(clock) == Launch(4)
    assert clock == []


def test_the_fastest_is_taken_and_kept_for_its_sizes_alone(clock):
    take(clock)
    with tuning.measuring():
        assert take(clock) == Launch(8)
    assert clock == [*LAUNCHES] * 3
    assert take(clock) == Launch(8)
    assert take(clock, sizes=(2,)) == Launch(4)
    assert len(clock) == 9


def test_later_processes_take_what_was_found_unless_it_is_no_longer_offered(clock, monkeypatch):
    with tuning.measuring():
        take(clock)
    monkeypatch.setattr(tuning, "_TAKEN", {})
    assert take(clock) == Launch(8)
    monkeypatch.setattr(tuning, "_TAKEN", {})
    assert take(clock, launches=LAUNCHES[::2]) == Launch(4)
    assert len(clock) == 9


def test_other_code_is_measured_again(clock, monkeypatch):
    with tuning.measuring():
        take(clock)
    monkeypatch.setattr(tuning, "_TAKEN", {})
    monkeypatch.setattr(tuning, "_version", lambda kernel: "another")
    assert take(clock) == Launch(4)


def test_the_search_is_bounded(clock, monkeypatch):
    monkeypatch.setattr(tuning, "SECONDS", 4 * SECONDS[4])
    with tuning.measuring():
        assert take(clock) == Launch(4)  # the others had no turn
    assert clock == [Launch(4)]


def test_other_threads_may_measure_too(clock):
    with tuning.measuring():  # gradients on a GPU run in threads of autograd's
        thread = threading.Thread(target=take, args=(clock,))
        thread.start()
        thread.join()
    assert clock == [*LAUNCHES] * 3
    assert take(clock) == Launch(8)


def test_a_launch_that_this_gpu_has_no_memory_for_is_passed_over(clock, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def seconds(call, device, calls):
        call()
        if clock[-1].warps == 8:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return SECONDS[clock[-1].warps]

    monkeypatch.setattr(tuning, "seconds", seconds)
    with tuning.measuring():
        assert take(clock) == Launch(2)


def test_where_nothing_can_be_launched_the_reason_is_raised_and_nothing_remembered(
    clock, monkeypatch, tmp_path
):
    from triton.runtime.errors import OutOfResources, PTXASError

    def seconds(call, device, calls):
        raise failures.pop()

    failures = [OutOfResources(2, 1, "shared memory"), PTXASError("no")] * 5
    monkeypatch.setattr(tuning, "seconds", seconds)
    with pytest.raises((OutOfResources, PTXASError)), tuning.measuring():
        take(clock)
    assert tuning._TAKEN == {}
    assert not list(tmp_path.rglob("*.json"))


def test_a_kernel_that_cannot_be_launched_is_refused_and_others_are_chosen(monkeypatch, tmp_path):
    from triton.runtime.errors import OutOfResources

    from fxsparse import choosing
    from fxsparse.kernel import registered
    from fxsparse.testing import problem_of, sparse_weight

    monkeypatch.setenv("FXSPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(choosing, "_CHOICES", {})
    prepared = choosing._prepared

    def fails(kernel, *call):
        if kernel.name == "cpu-csr":
            raise OutOfResources(2, 1, "shared memory")
        return prepared(kernel, *call)

    monkeypatch.setattr(choosing, "_prepared", fails)
    weight = sparse_weight((64, 32), 0.2).float()
    problem = problem_of(registered()["cpu-csr"], weight, 3, torch.float32, False, {"in_features": 32})
    choice = choosing.choose(problem, torch.randn(3, 32), weight)
    assert choice.refusals["cpu-csr"][0].startswith("it cannot be launched here: out of resource")
    assert "dense" in choice.times_us


def test_one_way_is_not_measured(clock):
    with tuning.measuring():
        assert take(clock, launches=LAUNCHES[:1]) == Launch(4)
    assert clock == []


def test_measuring_ends_with_its_block(clock):
    with pytest.raises(ZeroDivisionError), tuning.measuring():
        1 / 0  # noqa: B018
    take(clock)
    assert clock == []


def products() -> list[bool]:
    """Runs in the interpreter: a product while its launches are measured, and after; what is known then."""
    from fxsparse.kernels.csr import _triton

    torch.manual_seed(0)
    weight = torch.randn(6, 40) * (torch.rand(6, 40) < 0.3)
    crow = torch.cat([torch.zeros(1), (weight != 0).sum(1).cumsum(0)]).int()
    arguments = weight[weight != 0], crow, weight.nonzero()[:, 1].int(), 40, None, 0
    x = torch.randn(2, 40)
    with tuning.measuring():
        y = _triton.forward(x, *arguments)
    torch.testing.assert_close(y, x @ weight.T)
    torch.testing.assert_close(_triton.forward(x, *arguments), y)
    return [taken.is_measured for taken in tuning._TAKEN.values()]


def test_products_by_nonzeros_measure_their_launches_and_stay_right(tmp_path):
    code = "from tests.kernels.test_gpu_tuning import products\nprint(products())"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FXSPARSE_CACHE": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[True]"
    assert len(list((tmp_path / "measured").glob("*.json"))) == 1


@pytest.mark.gpu
def test_a_choice_on_a_gpu_measures_launches_and_ordinary_calls_do_not(monkeypatch, tmp_path):
    from fxsparse import choosing
    from fxsparse.kernel import Problem

    monkeypatch.setenv("FXSPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_TAKEN", {})
    cuda = torch.device("cuda", torch.cuda.current_device())
    weight = torch.randn(512, 1024, device=cuda) * (torch.rand(512, 1024, device=cuda) < 0.1)
    x = torch.randn(64, 1024, device=cuda)
    for training in (False, True):
        nnz = int(weight.count_nonzero())
        arguments = (("in_features", 1024),)
        problem = Problem("linear", (512, 1024), 64, nnz, x.dtype, cuda, training, arguments=arguments)
        choice = choosing.choose(problem, x, weight)
        assert ("cuda-csr-train" if training else "cuda-csr") in choice.times_us
    assert any(taken.is_measured for taken in tuning._TAKEN.values())

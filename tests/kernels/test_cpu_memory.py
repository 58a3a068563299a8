"""Large results come from memory that earlier ones gave back."""

import resource
import threading
from pathlib import Path

import pytest
import torch

from fxsparse.kernel import registered
from fxsparse.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.load(), reason="the C++ kernels are not there")

OUT, IN = 512, 16
KEPT = 512 << 20


@pytest.fixture(scope="module")
def product():
    """(a sparse product with a weight [512, 16], the same one dense)."""
    weight = torch.randn(OUT, IN) * (torch.rand(OUT, IN) < 0.2)
    entry = registered()["cpu-csr"]
    packed = tuple(entry.pack(weight).values())
    return lambda x: entry.run(x, None, *packed, in_features=IN), lambda x: x @ weight.t()


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def faults(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_memory_that_was_given_back_is_taken_again_without_new_pages(product):
    sparse, _ = product
    x = torch.randn(20_000, IN)  # a result of 41 MB: 10,000 pages, or 20 huge ones
    sparse(x)
    for size in (20_000, 19_000):  # a smaller one fits, too
        assert min(faults(lambda rows=x[:size]: sparse(rows)) for _ in range(5)) < 10


def test_results_that_are_in_use_are_nobody_elses(product):
    sparse, dense = product
    inputs = [torch.randn(n, IN) for n in (4_000, 2_100, 4_000, 6_000, 2_100)]
    held = [sparse(x) for x in inputs]
    del held[1]
    held.insert(1, sparse(inputs[1]))
    assert len({y.data_ptr() for y in held}) == len(held)
    for x, y in zip(inputs, held, strict=True):
        torch.testing.assert_close(y, dense(x))
        assert y.data_ptr() % 64 == 0
    view, kept = held[0][100:200], held[0][100:200].clone()
    del held
    sparse(inputs[0] + 1)
    assert torch.equal(view, kept)


def test_a_result_is_a_tensor_like_any_other(product):
    sparse, dense = product
    x = torch.randn(4_000, IN)
    y = sparse(x).share_memory_()
    torch.testing.assert_close(y.add_(1), dense(x) + 1)
    assert torch.equal(torch.from_numpy(y.numpy()).clone(), y)
    assert (y.device, y.is_shared(), y.is_contiguous()) == (torch.device("cpu"), True, True)


def test_results_in_bfloat16_have_memory_of_their_size():
    entry = registered()["cpu-csr"]
    packed = tuple(entry.pack(torch.ones(OUT, IN, dtype=torch.bfloat16)).values())
    assert entry.run(torch.ones(8_000, IN).bfloat16(), None, *packed, in_features=IN).eq(IN).all()


def test_threads_do_not_share_what_they_write(product):
    sparse, dense = product
    wrong = []

    def work(seed):
        x = torch.randn(3_000, IN, generator=torch.Generator().manual_seed(seed))
        wrong.extend(
            step for step in range(20) if not torch.allclose(sparse(x + step), dense(x + step), atol=1e-4)
        )

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_no_more_is_kept_than_is_said(product):
    sparse, _ = product
    before = resident()
    held = [sparse(torch.randn(80_000, IN)) for _ in range(6)]  # 164 MB each
    assert resident() - before > KEPT
    del held
    assert resident() - before < KEPT + (64 << 20)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_what_is_kept_can_be_given_back_to_the_system(product):
    sparse, _ = product
    x = torch.randn(40_000, IN)
    held = sparse(x)  # 82 MB
    sparse(x)
    before = resident()
    assert cpu.release_memory() >= held.nbytes
    assert before - resident() > held.nbytes // 2
    assert cpu.release_memory() == 0
    assert held.isfinite().all()

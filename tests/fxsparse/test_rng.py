import subprocess
import sys

import pytest
import torch

from fxsparse.rng import generator_for, hashed, integers


def draw(seed, name, step):
    return torch.rand(4, generator=generator_for(seed, name, step)).tolist()


def test_numbers_depend_on_seed_name_and_step():
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", -1), (0, "", 10), (0, "1", 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert draw(0, "a", 0) == draw(0, "a", 0)


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    first = draw(0, "a", 0)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert draw(0, "a", 0) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_process_draws_the_same_numbers():
    code = "from fxsparse.rng import generator_for; print(generator_for(3, 'blk.0.weight', 7).initial_seed())"
    for hash_seed in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(out.stdout) == generator_for(3, "blk.0.weight", 7).initial_seed()


def test_the_hash_is_splitmix64():
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # its numbers from the state 0
    assert hashed(0, 3, torch.device("cpu")).tolist() == [number >> 1 for number in known]


def test_numbers_for_another_device_need_one_of_the_generator_and_are_uniform():
    cpu, generator = torch.device("cpu"), generator_for(0, "a", 0)
    key = int(torch.randint(2**62, (), generator=generator_for(0, "a", 0)))
    assert integers(10, 5, generator, torch.device("meta")).device.type == "meta"
    after = generator_for(0, "a", 0)
    torch.randint(2**62, (), generator=after)
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=after))
    counts = torch.bincount(hashed(key, 60_000, cpu) % 6, minlength=6)
    assert ((counts - 10_000).abs() < 400).all()
    assert hashed(key, 0, cpu).tolist() == []


def test_on_the_cpu_they_are_the_generator_s_own():
    numbers = integers(50, 20, generator_for(0, "a", 0), torch.device("cpu"))
    assert torch.equal(numbers, torch.randint(50, (20,), generator=generator_for(0, "a", 0)))


@pytest.mark.gpu
def test_a_gpu_hashes_as_the_cpu():
    assert torch.equal(hashed(7, 1000, torch.device("cuda")).cpu(), hashed(7, 1000, torch.device("cpu")))

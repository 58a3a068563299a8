import subprocess
import sys

import torch

from fxsparse.rng import generator_for


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

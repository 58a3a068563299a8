"""Kill a training process at random moments, resume it from its checkpoint, and compare with a run that nobody killed.

``python -m benchmarks.kill_and_resume --kills 20``: a network that starts on meta trains with SET and Adam and saves
after every step.  Prints one line for every kill, and whether the end is equal bit for bit.
"""

import argparse
import multiprocessing
import random
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse import Plan, SparseModule, checkpoint
from fxsparse.methods import set_

WIDTH, STEPS = 64, 40


class Mlp(nn.Module):
    """Two sparse layers with a norm between them, whose statistics have to be resumed, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Linear(WIDTH, WIDTH),
            nn.BatchNorm1d(WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


def train(path: Path, steps: int) -> None:
    """Train up to `steps` optimizer steps, from the checkpoint if there is one, and save after each."""
    with torch.device("meta"):
        model = Mlp()
    if path.exists():
        optimizer = torch.optim.Adam(model.parameters())
        sparse = fxsparse.load(path, model, optimizer=optimizer)
    else:
        sparse = fxsparse.compile(model, _plan(), example_inputs=_batch(0))
        optimizer = torch.optim.Adam(sparse.parameters(), lr=0.01, betas=(0.8, 0.99))
        sparse.attach(optimizer)
    for step in range(_steps_done(sparse), steps):
        x = _batch(step)
        optimizer.zero_grad()
        F.mse_loss(sparse(x), x.roll(1, 1)).backward()
        optimizer.step()
        fxsparse.save(sparse, path, optimizer=optimizer)


def kill_and_resume(kills: int, seed: int = 0, steps: int = STEPS) -> list[int]:
    """The steps that were saved when each kill struck; AssertionError where the end or any file is not as it should be.

    A run starts again until it was killed `kills` times; then it may finish.
    """
    delays, context = random.Random(seed), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fxsparse"])
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, reached = Path(folder, "whole"), Path(folder, "killed"), []
        train(whole, steps)
        while len(reached) < kills:
            run = context.Process(target=train, args=(killed, steps))
            run.start()
            _wait_for_a_save(killed, run)
            time.sleep(delays.uniform(0.0, 0.2))
            run.kill()
            run.join()
            reached.append(checkpoint.read(killed)[1]["step"])
            if reached[-1] >= steps:
                killed.unlink()  # it had finished: this kill does not count
                reached.pop()
        train(killed, steps)
        assert {entry.name for entry in Path(folder).iterdir()} == {"whole", "killed"}, (
            "a killed write left files"
        )
        expected, found = checkpoint.read(whole)[0], checkpoint.read(killed)[0]
        different = [name for name in expected if not torch.equal(expected[name], found[name])]
        assert expected.keys() == found.keys(), "the resumed run saved other tensors"
        assert not different, f"differ after {kills} kills: {different}"
        return reached


def _wait_for_a_save(path: Path, run: BaseProcess) -> None:
    """Until the run has written once, so that every kill finds it at work."""
    before = path.stat().st_mtime_ns if path.exists() else None
    while run.is_alive() and (path.stat().st_mtime_ns if path.exists() else None) == before:
        time.sleep(0.002)


def _plan() -> Plan:
    return Plan(sparsity=0.8, method=set_(every=3), allocation="er")


def _steps_done(sparse: SparseModule) -> int:
    return int(sparse.get_buffer("fxsparse_step"))


def _batch(step: int) -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(step))


def main() -> None:
    """Read the options, run, and say what happened."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    words = options.parse_args()
    for number, step in enumerate(kill_and_resume(words.kills, words.seed, 10 * words.kills), 1):
        print(f"kill {number}: step {step} was saved")
    print("resumed bit for bit; no half-written checkpoint")


if __name__ == "__main__":
    main()

"""What the benchmarks share: their options, and what a table must say about where its numbers come from."""

import argparse

import torch

from fxsparse.kernels import cpu
from fxsparse.machine import processor


def environment(dtype: torch.dtype) -> str:
    """One line: processor, threads, dtype, versions, instruction set of the C++ kernels."""
    name = str(dtype).removeprefix("torch.")
    return (
        f"{processor()}; {torch.get_num_threads()} thread(s); {name}; torch {torch.__version__}; "
        f"kernels: {cpu.instruction_set()}"
    )


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--rounds", type=int, default=rounds, help="samples per number")
    return made


def arguments(description: str, rounds: int) -> argparse.Namespace:
    """The options that most benchmarks share; sets the number of threads."""
    made = parser(description, rounds)
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def ratio(of: float, to: float | None) -> str:
    """How many times faster than `of` the time `to` is; a dash where one was not measured."""
    return "-" if to is None else f"{of / to:.2f}x"

"""Bits per byte of a language model over Python's own source, by method: ``python -m benchmarks.tasks.bytes``.

    python -m benchmarks.tasks.bytes --methods rigl set static dense --sparsity 0.9 0.95

The text is the source of standard-library modules that every Python from 3.11 on has, as the running Python has it;
every tenth of them is held out.  The model is a causal transformer of 0.3 M parameters that reads 128 bytes at a time.
The score is that after the last step, over the held-out text in windows of 128 bytes, each from a fresh start.
Peak learning rates (RATES) were chosen on text of the training half, one for dense and one for all sparse methods.
"""

import functools
import hashlib
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import ByteTransformer
from benchmarks.tasks.comparison import Task, compare

_NAMES = """
argparse ast bdb bisect calendar cmd code codecs colorsys configparser contextlib copy csv dataclasses difflib
dis doctest enum filecmp fileinput fnmatch fractions ftplib functools getopt getpass gettext graphlib gzip
heapq hmac imaplib inspect io ipaddress linecache locale lzma mailbox mimetypes modulefinder netrc ntpath
numbers operator optparse os pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile
pstats py_compile pyclbr pydoc queue quopri random reprlib sched selectors shelve shlex shutil site smtplib
socket socketserver ssl stat statistics stringprep subprocess symtable tabnanny tarfile tempfile textwrap
threading timeit token tokenize trace traceback tracemalloc types typing uuid wave weakref webbrowser zipapp
"""
MODULES = _NAMES.split()
HELD_OUT = MODULES[4::10]
BATCH, TOKENS = 32, 128
RATES = (1e-2, 2e-2)


def text(modules: Sequence[str]) -> Tensor:
    """The sources of standard-library modules one after the other, as bytes: int64."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    joined = b"".join((folder / f"{module}.py").read_bytes() for module in modules)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


@functools.cache
def train_text() -> Tensor:
    """What models learn from."""
    return text([module for module in MODULES if module not in HELD_OUT])


@functools.cache
def test_text() -> Tensor:
    """What they are scored on: other modules."""
    return text(HELD_OUT)


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """32 windows of 128 bytes and the byte that follows each: both [32, 128]."""
    starts = torch.randint(len(train_text()) - TOKENS, (BATCH, 1), generator=generator)
    windows = train_text()[starts + torch.arange(TOKENS + 1)]
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """Mean bits that `model` needs for a byte of the held-out text; leaves it in eval mode."""
    model.eval()
    windows = test_text()[: (len(test_text()) - 1) // TOKENS * TOKENS + 1]
    inputs, labels = windows[:-1].view(-1, TOKENS), windows[1:].view(-1, TOKENS)
    nats = [
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        for x, y in zip(inputs.split(BATCH), labels.split(BATCH), strict=True)
    ]
    return math.fsum(nats) / labels.numel() / math.log(2)


def identity() -> dict[str, str]:
    """Tells the texts of different Pythons apart."""
    return {"text": hashlib.sha256(text(MODULES).byte().numpy().tobytes()).hexdigest()[:12]}


TASK = Task(
    name="bytes",
    score="bits per byte",
    models={"transformer": ByteTransformer},
    draw=draw,
    evaluate=evaluate,
    steps=300,
    seeds=3,
    seconds=40,
    identity=identity,
    rates=RATES,
)

if __name__ == "__main__":
    compare(TASK)

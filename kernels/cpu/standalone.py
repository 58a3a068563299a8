"""The C++ kernels as libraries that a process without this package loads: an exported model runs there."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from fxsparse.errors import UnsupportedError
from fxsparse.kernels.cpu import build

NAMES = ("libfxsparse_ops.so", "libfxsparse_cpu.so")
"""What `write_libraries` puts side by side; the first loads the second, and defines the ops that it has kernels for."""


def write_libraries(folder: Path, ops: Iterable[str]) -> Path:
    """Write both libraries into `folder` and return the one to load, by ``torch.ops.load_library`` or ``dlopen``.

    Not in a process that imports this package, which defines the ops itself.  `ops`: names in ``torch.ops.fxsparse``.

    Raises:
        UnsupportedError: there are no C++ kernels here, or not of one of the ops.
    """
    reason = build.availability()
    missing = [
        name for name in ops if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fxsparse::{name}", "CPU")
    ]
    if reason is not None or missing:
        raise UnsupportedError(
            f"expected C++ kernels for {', '.join(ops)}, as a process without Python needs them; got "
            f"{reason or f'none of {missing[0]}'}."
        )
    schemas = "".join(f'  m.def("{_schema(name)}");\n' for name in sorted(ops))
    source = f"#include <torch/csrc/stable/library.h>\nSTABLE_TORCH_LIBRARY_FRAGMENT(fxsparse, m) {{\n{schemas}}}\n"
    with tempfile.TemporaryDirectory(dir=folder) as made:
        kernels = Path(made, NAMES[1])
        shutil.copyfile(build.library(), kernels)
        Path(made, "ops.cpp").write_text(source)
        _compile(Path(made))
        for name in reversed(NAMES):
            os.replace(Path(made, name), folder / name)
    return folder / NAMES[0]


def _schema(name: str) -> str:
    return str(getattr(torch.ops.fxsparse, name).default._schema).removeprefix("fxsparse::")


def _compile(folder: Path) -> None:
    place = Path(torch.__file__).parent
    command = [
        *build.compiler(), "-O1", "-std=c++17", "-fPIC", "-shared", "ops.cpp", f"-I{place / 'include'}",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-L{place / 'lib'}", "-ltorch_cpu", "-lc10",
        "-Wl,--no-as-needed", "-L.", f"-l:{NAMES[1]}", "-Wl,-rpath,$ORIGIN", "-o", NAMES[0],
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnsupportedError(
            f"the C++ compiler failed on the ops of the exported model: {done.stderr.strip()}"
        )

"""Compiling the C++ kernels on first use, caching and loading them."""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fxsparse import machine
from fxsparse.errors import UnsupportedError
from fxsparse.kernel import Problem

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512vbmi", "avx512bf16")
"""What the kernels are compiled for; the best one that the CPU has is used."""

_OPS = ("csr_forward", "csr_backward", "csr_sample", "condensed_forward", "lookup_forward", "striped_forward")
_OPS += ("bsr_forward", "nm_lanes_forward", "strided_forward")
_OPS += (
    "csr_conv_forward",
    "csr_conv_backward",
    "csr_conv_sample",
    "csr_conv_inference",
    "soft_topk_sums",
    "max_pool",
    "attention",
    "depthwise_conv",
    "csr_conv_lanes",
    "csr_conv_lanes_over",
    "conv_lanes",
    "max_pool_lanes",
    "to_lanes",
    "from_lanes",
)
_FOLDER = Path(__file__).parent
_HEADERS = (
    "table.h",
    "vec.h",
    "rows.h",
    "planes.h",
    "memory.h",
    "tensors.h",
    "tiles.h",
    "window.h",
    "attend.h",
    "roof.h",
    "blocks.h",
    "lanes.h",
    "panels.h",
    "block_rows.h",
    "nm.h",
)
_SOURCES = (
    *_HEADERS,
    "products.cpp",
    "lookup.cpp",
    "ops.cpp",
    "conv.cpp",
    "topology.cpp",
    "soft_topk.cpp",
    "pool.cpp",
)
_SOURCES += ("tiles.cpp", "conv_inference.cpp", "attend.cpp", "attention.cpp", "depthwise.cpp")
_SOURCES += ("lanes.cpp", "conv_lanes.cpp", "bsr_pairs.cpp", "nm.cpp", "nm_linear.cpp")
_TORCH_UNITS = ("ops", "conv", "conv_inference", "topology", "soft_topk", "pool", "attention", "depthwise")
_TORCH_UNITS += ("conv_lanes", "nm_linear")
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_TABLES = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"],
}
_BEYOND = {
    "lookup": ["lookup.cpp", *_TABLES["avx512"], "-mavx512vbmi"],
    "bsr_pairs": ["bsr_pairs.cpp", *_TABLES["avx512"], "-mavx512bf16"],
}
"""Units of one instruction set alone."""


class _NoKernelsError(Exception):
    """Why the C++ kernels cannot be had here."""


def availability() -> str | None:
    """None where the C++ kernels are loaded (the first call builds them), else the reason why not."""
    return _load()


def load() -> bool:
    """Whether the C++ kernels are loaded; the first call builds them."""
    return _load() is None


def builds_for(name: str) -> bool:
    """Whether the op ``fxsparse::<name>`` builds the C++ kernels; others use them only once they are there."""
    return name in _OPS


def instruction_set(name: str | None = None) -> str:
    """The instruction set in use, one of INSTRUCTION_SETS or "reference", after asking for `name`.

    A set that the CPU lacks is lowered to the best it has.  The environment variable FXSPARSE_ISA asks from
    the start; "reference" there leaves the C++ kernels alone, and any other name is an UnsupportedError.
    """
    if _load() is not None:
        return "reference"
    level = -1 if name is None else INSTRUCTION_SETS.index(name)
    return INSTRUCTION_SETS[torch.ops.fxsparse.cpu_level(level)]


def in_use() -> str:
    """What runs, for a report: the instruction set, or why it is the PyTorch reference; builds nothing itself."""
    if not _load.cache_info().currsize:
        return "C++, not built before the first call that needs it"
    return instruction_set() if load() else f"PyTorch reference: {availability()}"


def has(name: str) -> bool:
    """Whether the instruction set in use is `name`, one of INSTRUCTION_SETS, or one beyond it."""
    return INSTRUCTION_SETS.index(name) <= (INSTRUCTION_SETS.index(instruction_set()) if load() else -1)


def release_memory() -> int:
    """Give memory that results and scratch left, and that is kept for the next ones, back to the system; its bytes."""
    return torch.ops.fxsparse.cpu_release() if _load.cache_info().currsize and load() else 0


def version() -> str:
    """What the C++ kernels in use are: sources, compiler and instruction set; why there are none otherwise."""
    return availability() or f"{library().stem} {instruction_set()}"


def refuses(problem: Problem) -> list[str]:
    """Reasons that hold for every C++ kernel."""
    reasons = []
    if problem.device.type != "cpu":
        reasons.append(f"it runs on cpu, not {problem.device.type}")
    if problem.dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"it has float32 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}")
    if not reasons and (reason := availability()) is not None:
        reasons.append(reason)
    return reasons


@functools.cache
def _load() -> str | None:
    wanted = os.environ.get("FXSPARSE_ISA", "")
    if wanted == "reference":
        return "FXSPARSE_ISA=reference asks for the PyTorch reference"
    if wanted and wanted not in INSTRUCTION_SETS:
        raise UnsupportedError(
            f"FXSPARSE_ISA: expected one of {', '.join((*INSTRUCTION_SETS, 'reference'))}, got {wanted!r}; correct the "
            "environment variable, or unset it for the best set that this CPU has."
        )
    try:
        torch.ops.load_library(str(library()))
    except (_NoKernelsError, OSError) as error:
        return str(error)
    if wanted:
        torch.ops.fxsparse.cpu_level(INSTRUCTION_SETS.index(wanted))
    return None


@functools.cache
def library() -> Path:
    """The shared library for these sources, compiler and architecture; built where it is not cached."""
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [(_FOLDER / name).read_bytes() for name in _SOURCES]
    stamp = repr((command, version, _FLAGS, _TABLES, _BEYOND, platform.machine(), sources)).encode()
    built = machine.cache_folder() / f"fxsparse_cpu_{hashlib.sha256(stamp).hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            _compile(command, Path(folder))
            os.replace(Path(folder) / "out.so", built)  # atomic: two processes may build at once
    return built


def compiler() -> list[str]:
    """The command of the C++ compiler: CXX, else the first that is there."""
    if asked := os.environ.get("CXX"):
        command = shlex.split(asked)
        if shutil.which(command[0]) is None:
            raise _NoKernelsError(f"no C++ compiler: CXX={asked} is not there")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise _NoKernelsError("no C++ compiler: none of g++, c++, clang++ is there, and CXX is not set")


def _compile(compiler: list[str], folder: Path) -> None:
    """Write ``out.so`` into `folder`; as many objects at once as this process has processors."""
    torch_folder = Path(torch.__file__).parent
    headers = [f"-I{torch_folder / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    headers.append(
        f"-fmacro-prefix-map={torch_folder.parent}{os.sep}="
    )  # messages name files, not this machine's
    x86 = ["-DFXSPARSE_X86"] if _X86 else []
    units = {name: [f"{name}.cpp", *headers, *x86] for name in _TORCH_UNITS}
    for name, flags in _TABLES.items():
        if _X86 or not flags:
            units[name] = ["products.cpp", f"-DFXSPARSE_TABLE=table_{name}", *flags]
            units[f"tiles_{name}"] = ["tiles.cpp", f"-DFXSPARSE_TILES=tiles_{name}", *flags]
            units[f"lanes_{name}"] = ["lanes.cpp", f"-DFXSPARSE_LANES=lanes_{name}", *flags]
            units[f"nm_{name}"] = ["nm.cpp", f"-DFXSPARSE_NM=nm_{name}", *flags]
            units[f"attend_{name}"] = ["attend.cpp", f"-DFXSPARSE_ATTEND=attend_{name}", *flags]
    if _X86:
        units |= _BEYOND
    objects = [str(folder / f"{name}.o") for name in units]
    commands = [
        [*compiler, *_FLAGS, "-c", source, *flags, "-o", target]
        for (source, *flags), target in zip(units.values(), objects, strict=True)
    ]
    run = functools.partial(subprocess.run, cwd=_FOLDER, capture_output=True, text=True, check=False)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(usable) as pool:
        for done in pool.map(run, commands):
            if done.returncode:
                raise _NoKernelsError(f"{compiler[0]} failed on the kernels: {_first_error(done.stderr)}")
    link = [*compiler, "-shared", *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-o"]
    linked = subprocess.run([*link, str(folder / "out.so")], capture_output=True, text=True, check=False)
    if linked.returncode:
        raise _NoKernelsError(f"{compiler[0]} failed to link the kernels: {_first_error(linked.stderr)}")


def _first_error(text: str) -> str:
    lines = text.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])

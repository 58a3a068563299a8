"""The Triton kernels, compiled for GPUs that are not here: registers, spills and shared memory of every form.

``python -m benchmarks.triton_ahead [--capabilities 80 90 100]`` needs no GPU; what does not compile, or takes more
shared memory than a multiprocessor has, is an error.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from tabulate import tabulate
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = (
    "fxsparse.kernels.bsr._triton",
    "fxsparse.kernels.csr._conv_triton",
    "fxsparse.kernels.csr._triton",
    "fxsparse.kernels.csr.backward_triton",
    "fxsparse.kernels.nm._triton",
    "fxsparse.kernels.top_mask._triton",
)
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes that a program may have, by compute capability."""
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
_TYPES |= {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}


def main() -> None:
    """Compile everything and print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--capabilities", type=int, nargs="+", default=list(SHARED), choices=list(SHARED))
    todo = [(v, c) for c in made.parse_args().capabilities for v in variants()]
    rows = [compiled(*variant, capability) for variant, capability in tqdm(todo, disable=None)]
    print(tabulate(rows, headers="keys", tablefmt="github"))
    print(
        f"\n{len(rows)} forms, {sum(row['spilled bytes'] > 0 for row in rows)} with spills; Triton {triton.__version__}"
    )


def variants() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """Those of all modules."""
    for module in MODULES:
        yield from import_module(module).variants()


def compiled(
    name: str, kernel: Any, arguments: dict[str, Any], options: dict[str, Any], capability: int
) -> dict[str, Any]:
    """One line of the table.

    Raises:
        ValueError: more shared memory than there is.
    """
    kinds = {p.name: p.is_constexpr for p in kernel.params}
    constants = {k: v for k, v in arguments.items() if kinds[k] or v is None or v == 1}  # as at a launch
    signature = {k: "constexpr" if k in constants else _TYPES.get(v, "i32") for k, v in arguments.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (key, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and arguments[key] % 16 == 0)
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    if made.metadata.shared > SHARED[capability]:
        raise ValueError(
            f"{name}: expected at most {SHARED[capability]} bytes of shared memory on sm_{capability}, got "
            f"{made.metadata.shared}; take fewer stages or a smaller tile"
        )
    registers, spilled = _resources(made.asm["ptx"])
    columns = {"registers": registers, "spilled bytes": spilled, "shared bytes": made.metadata.shared}
    return {"kernel": name, "sm": capability, **columns, "tensor cores": _tensor_cores(made.asm["ptx"])}


def _resources(ptx: str) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, as ptxas says."""
    found = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [
            str(_ptxas(ptx)),
            "-v",
            f"--gpu-name={found[1]}",
            str(file),
            "-o",
            str(file.with_suffix(".o")),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill", said)
    return max(map(int, re.findall(r"Used (\d+) registers", said))), sum(map(int, spills))


def _ptxas(ptx: str) -> Path:
    """The assembler that Triton brings which knows this version of PTX and what it is for."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    version = float(re.search(r"^\.version ([\d.]+)", ptx, re.MULTILINE)[1])  # type: ignore[index]
    capability = int(re.search(r"^\.target sm_(\d+)", ptx, re.MULTILINE)[1])  # type: ignore[index]
    return folder / ("ptxas" if version < 8.9 and capability < 100 else "ptxas-blackwell")


def _tensor_cores(ptx: str) -> str:
    return next((op for op in ("tcgen05.mma", "wgmma", "mma.sync") if op in ptx), "-")


if __name__ == "__main__":
    main()

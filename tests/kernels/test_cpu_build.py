import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxsparse.kernels import condensed_linear, cpu
from fxsparse.kernels.cpu import build
from fxsparse.kernels.mkl.linear import IS_AVAILABLE

ROOT = Path(__file__).resolve().parents[2]
LINEAR = """
import torch
from fxsparse.kernel import Problem, candidates
from fxsparse.kernels import condensed_linear, cpu
values, indices = torch.ones(3, 2), torch.tensor([[0, 1], [1, 2], [0, 2]], dtype=torch.int16)
print(condensed_linear(torch.tensor([1.0, 2.0, 4.0]), values, indices, in_features=3).tolist())
problem = Problem("linear", (3, 3), 1, 6, torch.float32, torch.device("cpu"), False, 2)
usable, refusals = candidates(problem)
print(cpu.instruction_set(), [kernel.name for kernel in usable], refusals.get("cpu-csr"))
"""


def run(code: str, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler: CXX=no-such-compiler is not there"),
        ({"CXX": "false"}, "false failed on the kernels: no message"),
        ({"PATH": "", "CXX": ""}, "no C++ compiler: none of g++, c++, clang++ is there"),
        ({"FXSPARSE_ISA": "reference"}, "FXSPARSE_ISA=reference asks for the PyTorch reference"),
    ],
)
def test_without_kernels_the_reference_runs_and_the_reason_is_visible(environment, reason, tmp_path):
    lines = run(LINEAR, FXSPARSE_CACHE=str(tmp_path), **environment).splitlines()
    assert lines[0] == "[3.0, 6.0, 5.0]"
    assert lines[1].startswith(f"reference {['dense', *['mkl'] * IS_AVAILABLE, 'onednn']}")
    assert reason in lines[1]
    assert not list(tmp_path.glob("*.so"))


REPORTS = """
import torch, fxsparse
model, x = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), torch.ones(1, 8)
planned = fxsparse.plan_report(model, fxsparse.Plan(sparsity=0.5), x)
with torch.no_grad():
    model[0].weight[:, ::2] = 0
report = fxsparse.compile(model, mode="infer", example_inputs=x).report
print(planned.to_dict()["environment"]["kernels"])
print(report.to_dict()["environment"]["kernels"])
kernels = report.to_dict()["environment"]["kernels"]
print([kernels in text for text in (str(report), report.to_json(), report.to_markdown(), report.to_html())])
"""


@pytest.mark.parametrize(
    ("environment", "kernels"),
    [
        (
            {"CXX": "no-such-compiler"},
            "PyTorch reference: no C++ compiler: CXX=no-such-compiler is not there",
        ),
        (
            {"FXSPARSE_ISA": "reference"},
            "PyTorch reference: FXSPARSE_ISA=reference asks for the PyTorch reference",
        ),
    ],
)
def test_every_report_says_which_kernels_run(environment, kernels, tmp_path):
    planned, compiled, shown = run(REPORTS, FXSPARSE_CACHE=str(tmp_path), **environment).splitlines()
    assert planned == "C++, not built before the first call that needs it"
    assert compiled == kernels
    assert shown == "[True, True, True, True]"


@pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))
def test_the_report_names_the_instruction_set():
    assert run(REPORTS, FXSPARSE_ISA="portable").splitlines()[1:] == ["portable", "[True, True, True, True]"]


def test_an_unknown_instruction_set_is_refused_by_name():
    wanted = "cpu.availability()\nexcept UnsupportedError as error:\n    print(error)"
    code = (
        f"from fxsparse.errors import UnsupportedError\nfrom fxsparse.kernels import cpu\ntry:\n    {wanted}"
    )
    assert run(code, FXSPARSE_ISA="bogus").startswith(
        "FXSPARSE_ISA: expected one of portable, avx2, avx512, avx512vbmi, avx512bf16, reference, got 'bogus'"
    )


def test_importing_builds_nothing(tmp_path):
    run("import fxsparse.kernels", FXSPARSE_CACHE=str(tmp_path), PATH="", CXX="")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))
def test_builds_into_the_asked_for_cache_once(tmp_path):
    # The last of these options counts; optimised, the build takes much longer.
    (compiler := tmp_path / "compiler").write_text(
        f'#!/bin/sh\nexec {shlex.join(build.compiler())} "$@" -O0\n'
    )
    compiler.chmod(0o755)
    environment = {"FXSPARSE_CACHE": str(tmp_path / "kernels"), "CXX": str(compiler)}
    first = run(LINEAR, **environment)
    (library,) = (tmp_path / "kernels").iterdir()
    built = library.stat().st_mtime_ns
    assert run(LINEAR, **environment) == first
    assert library.stat().st_mtime_ns == built
    assert "cpu-csr" in first


@pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))
def test_the_environment_asks_for_an_instruction_set():
    assert run(LINEAR, FXSPARSE_ISA="portable").splitlines()[1].startswith("portable")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_the_kernels_build_where_there_is_a_compiler():
    assert cpu.availability() in (None, "FXSPARSE_ISA=reference asks for the PyTorch reference")


def test_messages_and_the_library_name_no_folder_of_this_machine():
    if cpu.availability() is not None:
        pytest.skip("there are no C++ kernels")
    with pytest.raises(RuntimeError, match=r"^check_input, tensors\.h:\d+, fxsparse: expected x "):
        condensed_linear(
            torch.randn(2), torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int16), in_features=3
        )
    built = build.library().read_bytes()
    for folder in (ROOT, Path(torch.__file__).parent):
        assert str(folder).encode() not in built

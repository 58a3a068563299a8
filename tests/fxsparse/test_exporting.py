"""Other runtimes compute what the module computes: ONNX Runtime, an exported program, and code compiled ahead."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan, choosing, exporting, inference, kernel
from fxsparse.choosing import Choice
from fxsparse.errors import CheckpointError, PlanError, UnsupportedError
from fxsparse.inference import Speed
from fxsparse.kernels import cpu
from fxsparse.methods import static

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TAKEN = {"linear": "cpu-csr", "conv2d": "cpu-csr-conv"}


@pytest.fixture(autouse=True)
def sparse_is_faster(monkeypatch):
    def choose(problem, *rest, **options):
        taken = TAKEN[problem.op]
        return Choice(kernel.registered()[taken], {"dense": 10.0, taken: 5.0}, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)
    monkeypatch.setattr(inference, "speed_of", lambda *call: Speed(200.0, 100.0, 2.0))


def images():
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    model = nn.Sequential(*stem, nn.Linear(128, 8), nn.GELU()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand_like(parameter) < 0.2)
    return model


def runtime(path, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_onnx_has_dense_weights_and_any_batch(tmp_path):
    pytest.importorskip("onnxscript")
    plan = Plan(sparsity=0.5, method=static("magnitude"), storage="masked")
    trained = fxsparse.compile(images(), plan, example_inputs=X).eval()
    fast = fxsparse.compile(trained, mode="infer", example_inputs=X)
    fxsparse.export(fast, tmp_path / "fast.onnx", X)
    for x in (X, OTHER):
        for module in (fast, trained):
            torch.testing.assert_close(
                runtime(tmp_path / "fast.onnx", x), module(x).detach(), rtol=1e-4, atol=1e-5
            )
    assert [path.name for path in tmp_path.iterdir()] == ["fast.onnx"]
    dense, graph = exporting._dense(trained), exporting._dense(fast)
    assert torch.equal(dense(X), trained(X))
    assert "fxsparse" not in graph.code


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch.export.load of PyTorch 2.11
def test_an_exported_program_runs_the_sparse_kernels(tmp_path):
    fast = fxsparse.compile(images(), mode="infer", example_inputs=X)
    fxsparse.export(fast, tmp_path / "fast.pt2", X, format="program")
    program = torch.export.load(tmp_path / "fast.pt2")
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"fxsparse.csr_conv_inference.default", "fxsparse.csr_forward.default"} <= ops
    for x in (X, OTHER):
        assert torch.equal(program.module()(x), fast(x))


ALONE = """
import sys, torch
torch.ops.load_library(sys.argv[1] + "/libfxsparse_ops.so")
run = torch._inductor.aoti_load_package(sys.argv[1] + "/fast.pt2")
for x, y in torch.load(sys.argv[1] + "/expected.pt"):
    assert torch.equal(run(x), y)
assert "fxsparse" not in sys.modules
"""


@pytest.mark.slow
def test_a_process_without_fxsparse_runs_what_was_compiled_ahead(tmp_path):
    if cpu.availability() is not None:
        pytest.skip(f"no C++ kernels: {cpu.availability()}")
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[2].weight[:, ::3] = 0
    x, other = torch.randn(4, 64), torch.randn(7, 64)
    fast = fxsparse.compile(model, mode="infer", example_inputs=x)
    fxsparse.export(fast, tmp_path / "fast.pt2", x, format="aoti")
    assert {path.name for path in tmp_path.iterdir()} == {
        "fast.pt2",
        "libfxsparse_cpu.so",
        "libfxsparse_ops.so",
    }
    torch.save([(x, fast(x)), (other, fast(other))], tmp_path / "expected.pt")
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True, cwd=tmp_path)


class Asks(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(PlanError, match="expected a format of"):
        fxsparse.export(images(), tmp_path / "x", X, format="tflite")
    with pytest.raises(PlanError, match="takes a module compiled for inference, got Sequential"):
        fxsparse.export(images(), tmp_path / "x", X, format="program")
    asks = fxsparse.compile(Asks(), mode="infer", example_inputs=X)
    with pytest.raises(UnsupportedError, match="could not write this model as 'program'"):
        fxsparse.export(asks, tmp_path / "x", X, format="program")
    fast = fxsparse.compile(images(), mode="infer", example_inputs=X)
    with pytest.raises(CheckpointError, match="expected a file in a folder that exists"):
        fxsparse.export(fast, tmp_path / "no" / "x", X, format="program")
    assert list(tmp_path.iterdir()) == []

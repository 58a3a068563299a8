"""What benchmarks.engines gives to other engines, and the process that stands between DeepSparse and us."""

import os
import sys

import pytest
import torch
from torch import nn

from benchmarks.engines import DeepSparse, export, onnx_runtime

STAND_IN = '''
import onnxruntime


class Engine:
    """What the worker uses of deepsparse.Engine."""

    def __init__(self, model, batch_size, num_cores):
        print("an engine that talks", batch_size, num_cores)
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(self, inputs, val_inp=True):
        assert isinstance(inputs, list)
        names = [i.name for i in self.session.get_inputs()]
        return self.session.run(None, dict(zip(names, inputs, strict=True)))
'''


class Block(nn.Module):
    """Torch's multi-head attention, whose fast path has no ONNX op."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(16, 2, batch_first=True), nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture
def python_with_stand_in(tmp_path):
    """DeepSparse has its own environment; ONNX Runtime answers in its place."""
    (tmp_path / "deepsparse.py").write_text(STAND_IN)
    python = tmp_path / "python"
    program = f"import runpy, sys; sys.path.insert(0, '{tmp_path}'); runpy.run_path(sys.argv[1], run_name='__main__')"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}" "$2"\n')
    python.chmod(0o755)
    return str(python)


@torch.no_grad()
def test_an_exported_model_computes_the_same_and_nothing_is_left_changed(encoder, tmp_path):
    onnx = pytest.importorskip("onnx")
    x, path = torch.randn(2, 5, 16), tmp_path / "model.onnx"
    fused = torch.backends.mha.get_fastpath_enabled()
    export(encoder, x, path)
    assert torch.backends.mha.get_fastpath_enabled() == fused
    torch.testing.assert_close(onnx_runtime(path, x, 1)(), encoder(x), rtol=1e-4, atol=1e-5)
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert "Softmax" in ops  # attention as plain products
    assert "LayerNormalization" not in ops  # DeepSparse has no such op


@torch.no_grad()
def test_a_worker_answers_with_outputs_and_times_of_any_model(encoder, tmp_path, python_with_stand_in):
    x, path = torch.randn(2, 5, 16), tmp_path / "model.onnx"
    export(encoder, x, path)
    engine = DeepSparse(python_with_stand_in, path, x, 1)
    torch.testing.assert_close(engine.output, encoder(x), rtol=1e-4, atol=1e-5)
    assert engine.microseconds(3) > 0
    assert engine.load_seconds > 0
    engine.close()


def test_a_worker_that_fails_is_an_error(tmp_path):
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nread request; exit 3\n")
    stub.chmod(0o755)
    with pytest.raises(OSError, match="worker ended with status 3"):
        DeepSparse(str(stub), tmp_path / "model.onnx", torch.randn(1, 33), 1)


@pytest.mark.skipif(
    "FXSPARSE_DEEPSPARSE_PYTHON" not in os.environ, reason="no Python with DeepSparse was named"
)
@torch.no_grad()
def test_deepsparse_itself(encoder, tmp_path):
    x, path = torch.randn(2, 5, 16), tmp_path / "model.onnx"
    export(encoder, x, path)
    engine = DeepSparse(os.environ["FXSPARSE_DEEPSPARSE_PYTHON"], path, x, 1)
    torch.testing.assert_close(engine.output, encoder(x), rtol=1e-4, atol=1e-5)
    assert engine.microseconds(3) > 0
    engine.close()

"""Inference engines outside torch: ONNX Runtime in this process, and DeepSparse in a process of its own Python."""

import copy
import json
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

OPSET = 14
"""DeepSparse 1.8 fuses the norms of this opset, and runs LayerNormalization (opset 17) outside its engine."""


def export(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write `model` on batches like `x` as one ONNX file in the form that DeepSparse 1.8 runs fastest.

    That is the TorchScript exporter's, with attention as plain products: from torch.export's graph, or with the
    attention of PyTorch in one op, the engine leaves part of a transformer to a slower one, and takes up to three times
    as long.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        choose: Any = getattr(module, "set_attn_implementation", None)  # a transformer of Hugging Face has it
        if choose is not None:
            choose("eager")
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            warnings.filterwarnings("ignore", "Exporting aten::index", UserWarning)
            torch.onnx.export(model, (x,), str(path), opset_version=OPSET, dynamo=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def onnx_runtime(path: Path, x: Tensor, threads: int) -> Callable[[], Tensor]:
    """A call of the ONNX file on `x`; threads beyond the first stop spinning when a call is done."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


class DeepSparse:
    """One ONNX file in DeepSparse, in a process of `python`, which has it; leave with `close`.

    Raises:
        OSError: the process ended instead of answering.
    """

    def __init__(self, python: str, model: Path, x: Tensor, threads: int) -> None:
        worker = Path(__file__).with_name("deepsparse_worker.py")
        self._process = subprocess.Popen(  # isolated: the files beside the worker are not its modules
            [python, "-I", str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "model.onnx").symlink_to(model.resolve())
            numpy.savez(folder / "inputs.npz", x.numpy())
            self.load_seconds = self._ask(load=name, batch=len(x), threads=threads)["seconds"]
            with numpy.load(folder / "outputs.npz") as arrays:
                self.output = torch.from_numpy(arrays[arrays.files[0]])

    def microseconds(self, runs: int) -> float:
        """Of one of `runs` runs in a row, by its own clock, so that the pipe does not count."""
        return self._ask(runs=runs)["us"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, **request: object) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            raise OSError(f"the DeepSparse worker ended with status {self._process.returncode} on {request}")
        return json.loads(answer)

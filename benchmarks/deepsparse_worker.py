"""One linear layer in DeepSparse, in a Python that has it (and onnx): run by benchmarks.srigl_layer, not by hand.

Reads requests as lines of JSON and answers each with one: ``{"load": FILE, "batch": B, "threads": T}`` builds the layer
from the arrays weight, bias and x of an .npz and answers with its output; ``{"runs": N}`` answers with the microseconds
of one of N runs.  It imports nothing of this repository.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy

# Neither is installed where the rest of the repository is read and checked.
onnx: Any = importlib.import_module("onnx")
deepsparse: Any = importlib.import_module("deepsparse")


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints must not get between the answers
    engine, inputs = None, []
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            arrays = numpy.load(request["load"])
            inputs = [arrays["x"]]
            model = Path(request["load"]).with_suffix(".onnx")
            onnx.save(layer(arrays["weight"], arrays["bias"], request["batch"]), str(model))
            engine = deepsparse.Engine(str(model), batch_size=request["batch"], num_cores=request["threads"])
            answer = {"output": engine.run(inputs)[0].tolist()}
        else:
            assert engine is not None
            start = time.perf_counter()
            for _ in range(request["runs"]):
                engine.run(inputs, val_inp=False)
            answer = {"us": 1e6 * (time.perf_counter() - start) / request["runs"]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def layer(weight: numpy.ndarray, bias: numpy.ndarray, batch: int) -> Any:
    """The model ``y = x W^T + b`` as one Gemm; the engine finds the zeros of W itself."""
    out_features, in_features = weight.shape
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], transB=1)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", floats, [batch, in_features])],
        [helper.make_tensor_value_info("y", floats, [batch, out_features])],
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(bias, "bias")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


if __name__ == "__main__":
    main()

"""One ONNX file in DeepSparse, in a Python that has it: run by benchmarks.engines, not by hand.

Reads requests as lines of JSON and answers each with one: ``{"load": FOLDER, "batch": B, "threads": T}`` loads
model.onnx, runs it on the arrays of inputs.npz in their order, writes its outputs into outputs.npz and answers with the
seconds that loading took; ``{"runs": N}`` answers with the microseconds of one of N runs in a row.  It imports nothing
of this repository.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy

# Not installed where the rest of the repository is read and checked.
deepsparse: Any = importlib.import_module("deepsparse")


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints must not get between the answers
    engine, inputs = None, []
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        if "load" in request:
            folder = Path(request["load"])
            with numpy.load(folder / "inputs.npz") as arrays:
                inputs = [arrays[name] for name in arrays.files]
            model = str(folder / "model.onnx")
            engine = deepsparse.Engine(model, batch_size=request["batch"], num_cores=request["threads"])
            answer = {"seconds": time.perf_counter() - start}
            numpy.savez(folder / "outputs.npz", *engine.run(inputs))
        else:
            assert engine is not None
            for _ in range(request["runs"]):
                engine.run(inputs, val_inp=False)
            answer = {"us": 1e6 * (time.perf_counter() - start) / request["runs"]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

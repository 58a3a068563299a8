import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cells, layer_methods
from benchmarks.cells import Cell
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import chooser, clock, decode, rivals, roofs
from benchmarks.gpu.asked import asked
from benchmarks.gpu.clock import Ready, times
from benchmarks.gpu.rivals import Rival, compare
from benchmarks.gpu.tables import lines, tables

CPU = torch.device("cpu")
OURS = {
    "layer": {"fxsparse cuda-condensed", "fxsparse cuda-csr"},
    "decode": {"fxsparse cuda-condensed", "fxsparse cuda-csr"},
    "blocks": {"fxsparse cuda-bsr", "fxsparse cuda-bsr-train"},
    "semi": {"fxsparse cuda-nm"},
}


ONLY_ON_GPUS = {
    "layer": set(),
    "decode": {"cuSPARSE CSR"},
    "blocks": {"torch BSR", "torch Triton", "torch Triton, x^T as a view"},
    "semi": {"cuSPARSELt", "cuSPARSELt, searched", "CUTLASS"},
}
"""What no CPU has, or not in bfloat16."""


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.setattr(layer_methods, "compiled", lambda function: function)  # Inductor takes seconds


@pytest.mark.parametrize("part", list(command.PARTS))
def test_a_part_runs_on_small_shapes_and_finished_cells_do_not_run_again(part, tmp_path, capsys):
    words = ["--device", "cpu", "--tiny", "--part", part, "-o", str(tmp_path / "gpu.json")]
    assert command.main(words) == 0
    printed = capsys.readouterr().out
    assert "cells to run, about" in printed
    found = cells.read_cells(tmp_path / "gpu.json")
    assert all(c.settings["part"] == part and "failed" not in c.result for c in found)
    if part in OURS:
        assert all("dense" in c.result["us"] for c in found)
        names = {name for c in found for name in c.result["us"] if name.startswith("fxsparse")}
        assert names == OURS[part]
        assert {name for c in found for name in c.result["missing"]} <= ONLY_ON_GPUS[part]
        assert max(e for c in found for e in c.result["errors"].values()) < 0.01
    if part == "updates":
        assert [c.result["moved"] for c in found] == [6, 6]
    assert command.main(words) == 0
    assert f"0 of {len(found)} cells to run" in capsys.readouterr().out


def test_the_grids_hold_what_was_asked_for():
    layer, decoding, blocks = (command.PARTS[n].grid(False, False) for n in ("layer", "decode", "blocks"))
    assert {(c["rows"], c["fan_in"], c["batch"]) for c in layer} == {(318, 741, 256), (768, 307, 256)}
    assert [(c["out"], c["in"], c["batch"]) for c in decoding] == [(4096, 14336, b) for b in (1, 2, 4, 8)]
    assert {(c["block"], c["backward"]) for c in blocks} == {
        (b, w) for b in (16, 32, 64, 128) for w in (False, True)
    }
    drawn = chooser.grid(False, False)
    assert len({json.dumps(c) for c in drawn}) == 200 == len(drawn)
    assert drawn[:20] == chooser.grid(True, False)
    minutes = sum(len(p.grid(False, False)) * p.seconds for p in command.PARTS.values()) / 60
    assert minutes <= 10


def test_several_parts_have_a_process_each_and_one_that_fails_is_not_the_last(monkeypatch, capsys):
    ran = []

    def run(words, check):
        ran.append(words[1:])
        return SimpleNamespace(returncode=int(words[-1] == "layer"))

    monkeypatch.setattr(subprocess, "run", run)
    words = ["--device", "cpu", "--tiny", "--part", "layer", "semi"]
    assert command.main(words) == 1
    assert ran == [["-m", "benchmarks.gpu", *words, "--part", name] for name in ("layer", "semi")]
    assert "min where nothing is done yet" in capsys.readouterr().out


def test_a_cell_that_fails_says_so_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    part = command.PARTS["layer"]

    def measure(settings, device):
        if settings["rows"] == 5:
            raise RuntimeError("no memory\nand more")
        return part.measure(settings, device)

    monkeypatch.setitem(command.PARTS, "layer", command.Part(part.grid, measure, 1.0))
    words = ["--device", "cpu", "--tiny", "--part", "layer", "-o", str(tmp_path / "gpu.json")]
    assert command.main(words) == 1
    printed = capsys.readouterr().out
    assert "FAILED: rows 5 fan_in 7 out 12 in 33 batch 4: RuntimeError: no memory" in printed
    assert "fxsparse cuda-csr" in printed


def test_times_of_small_shapes_are_not_kept_among_the_results():
    assert command._options(["--device", "cpu", "--tiny"]).output is None
    assert str(command._options(["--device", "cpu"]).output) == "benchmarks/results/gpu.json"


def test_there_is_no_silent_fallback_to_the_cpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        command.main(["--part", "layer"])


def test_a_rival_that_is_wrong_or_not_there_is_named_and_dense_has_to_run():
    x = torch.randn(3, 4)
    exact = x.double()

    def absent():
        raise NotImplementedError("not here\nat all")

    dense = Rival("dense", lambda: [x.clone], (exact,))
    wrong = Rival("wrong", lambda: [lambda: x * 1.001], (exact,))
    lost = Rival("nan", lambda: [lambda: x * float("nan")], (exact,))
    found = compare([dense, wrong, lost, Rival("absent", absent, (exact,))], CPU)
    assert set(found["us"]) == set(found["errors"]) == {"dense"}
    assert found["missing"]["absent"] == "NotImplementedError: not here"
    assert "expected a relative error of at most 1e-04, got 1.0e-03" in found["missing"]["wrong"]
    assert "got nan" in found["missing"]["nan"]
    y = x.clone()
    found = compare([dense, Rival("unwritten", lambda: [lambda: y], (exact,))], CPU)
    assert "got nan" in found["missing"]["unwritten"]
    with pytest.raises(ValueError, match="expected wrong to run"):
        compare([wrong, dense], CPU)


def test_tf32_is_set_for_a_rival_alone():
    before, seen = torch.backends.cuda.matmul.allow_tf32, []

    def make():
        return [lambda: seen.append(torch.backends.cuda.matmul.allow_tf32) or torch.ones(1)]

    one = (torch.ones(1).double(),)
    rivals._checked(Rival("dense", make, one))
    rivals._checked(Rival("tf32", make, one, tf32=True))
    assert seen == [False, False, True, True]
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_a_call_over_copies_counts_for_each_of_them(monkeypatch):
    ran = []
    copies = Ready([lambda i=i: ran.append(i) or torch.ones(1) for i in range(4)])
    found = times({"copies": copies}, CPU)
    assert ran == [0, 1, 2, 3] * (clock.ROUNDS[0] + 1)
    assert len(found.us["copies"]) == 4
    monkeypatch.setattr(clock, "interleaved_samples", lambda runs, **_: {name: [8.0, 8.0] for name in runs})
    assert times({"copies": copies}, CPU).us == {"copies": [2.0] * 4}


class Device:
    """Stands in for the events, streams and graphs of torch.cuda: every call takes 100 us of its time."""

    def __init__(self, monkeypatch):
        self.now, self.captured = 0.0, None
        self.fails = False
        for name in ("Event", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name.lower()))
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda s: self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.captured is not None:
            self.captured.calls, self.captured = self.count, None
        return False

    def call(self):
        if self.captured is None:
            self.now += 100
        elif self.fails:
            raise RuntimeError("capture is not permitted")
        else:
            self.count += 1
        return torch.ones(1)

    def event(self, enable_timing):
        made = SimpleNamespace(at=0.0, synchronize=lambda: None)
        made.record = lambda: setattr(made, "at", self.now)
        made.elapsed_time = lambda end: (end.at - made.at) / 1e3
        return made

    def cudagraph(self):
        graph = SimpleNamespace(calls=0)
        graph.replay = lambda: setattr(self, "now", self.now + 10 * graph.calls)  # faster than from Python
        return graph

    def graph(self, graph, stream, capture_error_mode):
        self.captured, self.count = graph, 0
        return self


def test_on_a_gpu_calls_and_graphs_are_timed_by_events(monkeypatch):
    device = Device(monkeypatch)
    found = times({"two": Ready([device.call] * 2), "one": Ready([device.call])}, torch.device("cuda"), 0.01)
    assert found.us == {"two": [10.0] * 4, "one": [10.0] * 4}
    assert found.calls_us == {"two": [100.0] * 4, "one": [100.0] * 4}
    assert found.uncaptured == {}


def test_what_no_graph_takes_is_timed_as_calls_alone(monkeypatch):
    device = Device(monkeypatch)
    device.fails = True
    found = times({"one": Ready([device.call])}, torch.device("cuda"), 0.01)
    assert (found.us, found.calls_us) == ({}, {"one": [100.0] * 4})
    assert found.uncaptured == {"one": "RuntimeError: capture is not permitted"}


def test_a_gpus_caches_and_versions_are_asked_for(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=100, multi_processor_count=2, name="G")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert roofs.copies(150, torch.device("cuda")) == 3
    assert roofs.copies(1, torch.device("cuda")) == 64
    said = SimpleNamespace(returncode=0, stdout="1980\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: said)
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert roofs._highest_clock(torch.device("cuda")) == 1.98e9
    monkeypatch.setattr(cells, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "G")
    cells._gpu.cache_clear()
    assert {k: v for k, v in cells.environment().items() if k in ("gpu", "driver")} == {
        "gpu": "G",
        "driver": "1980",
    }
    cells._gpu.cache_clear()


def test_a_line_has_ratios_to_dense_and_to_ours_and_the_share_of_the_limit():
    result = {
        "us": {"dense": [8, 9, 10, 11], "fxsparse a": [3, 4, 5, 6], "fxsparse b": [1, 1, 2.5, 3]},
        "limits": {"DRAM": {"fxsparse b": 1.0}},
    }
    result |= {"calls_us": result["us"] | {"other": [20, 20, 20, 20]}, "errors": dict.fromkeys("abc", 0.0)}
    result["errors"] = dict.fromkeys(result["calls_us"], 1e-3)
    found = {line["rival"]: line for line in lines(Cell({"part": "decode", "batch": 1}, result, 1.0, {}))}
    assert (found["dense"]["of dense"], found["dense"]["ours of it"]) == (1, 4)
    assert (found["fxsparse b"]["of dense"], found["fxsparse b"]["of DRAM"]) == (4, 0.4)
    assert found["other"]["graph us"] is None
    assert found["other"]["call us"] == 20


def test_the_choosers_table_has_the_share_within_five_percent_and_the_worst():
    def cell(out, taken, dense, csr):
        us = {"dense": [dense] * 4, "fxsparse cuda-csr": [csr] * 4}
        result = {"us": us, "calls_us": us, "chosen": taken}
        return Cell({"part": "chooser", "device": "G", "out": out}, result, 1.0, {})

    found = tables("chooser", [cell(1, "dense", 10.0, 9.8), cell(2, "cuda-csr", 10.0, 12.0)])
    row = [word.strip() for word in found.splitlines()[2].split("|")[1:-1]]
    assert row == ["calls", "2", "50.0%", "50.0%", "1.200", "1.200", "2", "cuda-csr"]


def test_what_was_asked_for_is_held_against_our_fastest_kernel_and_the_fastest_rival():
    us = {"dense": [1, 1, 40.0, 50], "fxsparse a": [1, 1, 30.0, 50], "fxsparse b": [1, 1, 10.0, 50]}
    result = {"us": us, "limits": {"DRAM": {"fxsparse a": 1.0, "fxsparse b": 6.0}}}
    cell = Cell({"part": "decode", "device": "G", "batch": 1}, result, 1.0, {})
    found = [(line["got"], line["met"]) for line in asked("decode", [cell])]
    assert found == [(4.0, "yes"), (0.6, "NO")]
    us |= {"torch Triton": [1, 1, 9.0, 9], "torch BSR": [1, 1, 20.0, 20]}
    cell = Cell({"part": "blocks", "block": 64, "backward": False}, result, 1.0, {})
    assert [(line["got"], line["met"]) for line in asked("blocks", [cell])] == [(4.0, "yes"), (0.9, "NO")]
    missing = Cell({"part": "semi", "size": 64}, {"us": {"dense": [1] * 4}}, 1.0, {})
    assert asked("semi", [missing])[0]["met"] == "not measured"
    slow = Cell({"part": "updates", "model": "m"}, {"share": 0.04}, 1.0, {})
    assert asked("updates", [slow])[0]["met"] == "NO"


def test_decodings_limit_is_that_of_the_bytes_of_values_and_indices(monkeypatch):
    monkeypatch.setattr(decode, "bytes_per_second", lambda device: {"DRAM": 1e6})
    found = decode.measure({"out": 12, "in": 33, "fan_in": 3, "batch": 2}, CPU)
    assert found["bytes"]["fxsparse cuda-condensed"] == 12 * 3 * (2 + 2)
    assert found["limits"]["DRAM"]["fxsparse cuda-condensed"] == 144 + 2 * 33 * 2 + 2 * 12 * 2

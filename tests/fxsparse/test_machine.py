import json

import pytest
import torch

from fxsparse import machine


def test_what_was_remembered_is_recalled_by_its_own_key_alone():
    machine.remember(("times", 3), {"dense": 1.5})
    assert machine.recall(("times", 3)) == {"dense": 1.5}
    assert machine.recall(("times", 4)) is None


def test_another_processor_or_torch_measures_again(monkeypatch):
    machine.remember("key", 1)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(machine, "processor", lambda: "another")
        assert machine.recall("key") is None
    assert machine.recall("key") == 1
    monkeypatch.setattr(torch, "__version__", "0")
    assert machine.recall("key") is None


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"key": "of something else", "value": 1})])
def test_a_file_that_is_not_what_was_kept_counts_as_nothing(text):
    machine.remember("key", 1)
    (file,) = machine.measured_folder().iterdir()
    file.write_text(text)
    assert machine.recall("key") is None
    machine.remember("key", 2)
    assert machine.recall("key") == 2


def test_a_folder_that_cannot_be_written_keeps_nothing_and_stops_nobody(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(machine, "measured_folder", lambda: tmp_path / "file" / "below")
    machine.remember("key", 1)
    assert machine.recall("key") is None


def test_the_cache_folder_is_the_one_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("FXSPARSE_CACHE", str(tmp_path))
    assert machine.cache_folder() == tmp_path
    monkeypatch.delenv("FXSPARSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.cache_folder() == tmp_path / "fxsparse"


def test_limits_are_the_larger_of_arithmetic_and_reading(monkeypatch):
    seconds = {"flops": 1e-3, "bytes": 1e-5}  # 268 GFLOP/s; 256 KiB in 10 us
    monkeypatch.setattr(machine, "_roof", lambda name, *_: seconds[name])
    assert machine.limit_us(2 * 512**3, 4, torch.float32) == pytest.approx(1e3)
    assert machine.limit_us(2, 1 << 18, torch.float32) == pytest.approx(10)
    assert machine.limit_us(2, 1 << 17, torch.float32) == pytest.approx(5)


def test_roofs_are_measured_once():
    machine._roof.cache_clear()
    first = machine._roof("bytes", 1 << 18, torch.float32, 1)
    assert first > 0
    machine._roof.cache_clear()
    assert machine._roof("bytes", 1 << 18, torch.float32, 1) == first

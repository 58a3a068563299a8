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


def test_roofs_are_measured_once_on_a_machine_and_remembered(monkeypatch):
    made = []
    for _ in range(2):
        monkeypatch.setattr(machine, "_SECONDS", {})  # as in another process
        for _ in range(2):
            seconds = machine.least_seconds("a loop", lambda: made.append(1) or (lambda: None))
            assert seconds >= 0
    assert len(made) == 1


def test_torch_roofs_are_rates_of_what_was_asked_for(monkeypatch):
    keys = []

    def half_a_second(key, prepare):
        prepare()()
        keys.append(key)
        return 0.5

    monkeypatch.setattr(machine, "least_seconds", half_a_second)
    assert machine.flops_per_second(torch.bfloat16) == 2 * 512**3 / 0.5
    assert machine.bytes_per_second(1 << 18) == (1 << 18) / 0.5
    assert [key[1:3] for key in keys] == [("product", 512), ("dot", 1 << 18)]
    assert "torch.bfloat16" in keys[0]

"""Where files may be written."""

import os
import stat

import pytest
import torch

import fxsparse
from fxsparse import Plan
from fxsparse.destination import destination
from fxsparse.errors import CheckpointError


@pytest.mark.parametrize("path", [None, b"bytes.st", "", "a\0b", 3, "\ud800"])
def test_what_names_no_file_is_refused(path):
    with pytest.raises(CheckpointError, match="expected"):
        destination(path)


def test_a_file_a_new_name_and_links_to_them_are_taken(tmp_path):
    file, link, loose = tmp_path / "file", tmp_path / "link", tmp_path / "loose"
    file.write_text("")
    link.symlink_to(file)
    loose.symlink_to(tmp_path / "new")
    assert destination(file) == destination(str(link)) == file.resolve()
    assert destination(loose) == tmp_path.resolve() / "new"


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe, link, x = tmp_path / "pipe", tmp_path / "link", torch.randn(2, 4)
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    sparse = fxsparse.compile(model, Plan(sparsity=0.5), example_inputs=(x,))
    for write in (
        lambda: fxsparse.save(sparse, pipe),
        lambda: fxsparse.save(sparse, link),
        lambda: fxsparse.export(model, pipe, (x,)),
    ):
        with pytest.raises(CheckpointError, match="got a pipe"):
            write()
    with pytest.raises(CheckpointError, match="got a folder"):
        destination(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="got a pipe"):
        fxsparse.save_pretrained(sparse, tmp_path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISFIFO((tmp_path / "model.safetensors").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model.safetensors", "pipe"]

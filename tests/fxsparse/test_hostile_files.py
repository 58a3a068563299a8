"""Whatever a file holds, loading it is a CheckpointError and changes nothing."""

import copy
import json
import pickle
import random

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan, checkpoint
from fxsparse.errors import CheckpointError, PlanError
from fxsparse.methods import rigl, static

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
PLANS = {
    "masked": Plan(sparsity=0.5, method=rigl()),
    "compact": Plan(sparsity=0.5, method=static("random"), storage="compact"),
}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


@pytest.fixture(scope="module")
def contents(request, tmp_path_factory):
    sparse = fxsparse.compile(net(), PLANS[getattr(request, "param", "masked")], example_inputs=X)
    optimizer = torch.optim.AdamW(sparse.parameters())
    sparse(X).sum().backward()
    optimizer.step()
    path = tmp_path_factory.mktemp("saved") / "file"
    fxsparse.save(sparse, path, optimizer=optimizer)
    return path.read_bytes()


@pytest.fixture
def path(contents, tmp_path):
    (tmp_path / "file").write_bytes(contents)
    return tmp_path / "file"


def refused(path, model=None, match=None):
    """Loading is refused by name; the model, its optimizer, the file and its folder stay as they are."""
    model = net() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(X).sum().backward()
    optimizer.step()
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    held = [(id(group), [id(p) for p in group["params"]]) for group in optimizer.param_groups]
    files = sorted(path.parent.iterdir())
    with pytest.raises(CheckpointError, match=match):
        fxsparse.load(path, model, optimizer=optimizer)
    now = (model.state_dict(), optimizer.state_dict())
    assert str(now) == str(kept)
    assert held == [(id(group), [id(p) for p in group["params"]]) for group in optimizer.param_groups]
    assert sorted(path.parent.iterdir()) == files


def forged(path, change):
    """The file with another header or other tensors, and a hash that fits them."""
    tensors, header = checkpoint.read(path)
    change(header, tensors)
    header.pop("format")
    header.pop("aliases")
    checkpoint.write(path, tensors, header)


def put(*keys, value):
    def change(header, tensors):
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


def without(key):
    return lambda header, tensors: header.pop(key)


def renamed(header, tensors):
    tensors["state/../../../etc/passwd"] = tensors.pop("state/0.bias")


def shared_optimizer(header, tensors):
    header["optimizer"]["names"][0] = "no such parameter"


def lost_moments(header, tensors):
    del tensors["optimizer/1/exp_avg"]


HEADERS = {
    "kind": put("kind", value=["training"]),
    "no kind": without("kind"),
    "inference": put("kind", value="inference"),
    "tier": put("tier", value="os.system"),
    "plan": put("plan", value={"sparsity": 7}),
    "plan is a list": put("plan", value=[]),
    "weights": put("weights", "0.weight", value=[2**60, 2**60]),
    "size is NaN": put("weights", "0.weight", value=[float("nan"), 6]),
    "size is infinite": put("weights", "0.weight", value=[float("inf"), 6]),
    "size is negative": put("weights", "0.weight", value=[-5, -6]),
    "huge count": put("decisions", "0.weight", "nnz", value=2**70),
    "negative count": put("decisions", "0.weight", "nnz", value=-1),
    "storage": put("decisions", "0.weight", "storage", value="/etc/passwd"),
    "pattern": put("decisions", "0.weight", "pattern", value={"name": "os"}),
    "unknown field": put("decisions", "0.weight", "__class__", value="x"),
    "huge input": put("example_inputs", value={"tensor": [2**80], "dtype": "float32"}),
    "negative input": put("example_inputs", value={"tensor": [-1], "dtype": "float32"}),
    "dtype": put("example_inputs", value={"tensor": [1], "dtype": "load"}),
    "inputs are text": put("example_inputs", value="x"),
    "check": put("accepts", value={"eval": {"names": ["x"]}}),
    "code": put(
        "accepts",
        value={
            "eval": {
                "names": ["x"],
                "structures": [None],
                "wanted": None,
                "same": None,
                "condition": {"symbol": "__import__('os').abort()", "positive": True},
            }
        },
    ),
    "class": put(
        "accepts",
        value={
            "eval": {
                "names": ["x"],
                "structures": ['[1, {"type": "os.system", "context": "[]", "children_spec": []}]'],
                "wanted": None,
                "same": None,
                "condition": {"truth": "true"},
            }
        },
    ),
    "topology": put("topology", value={"weights": {"0.weight": {"shape": [1]}}}),
    "traversal": renamed,
    "optimizer's names": shared_optimizer,
    "optimizer's state": lost_moments,
    "optimizer's groups": lambda header, tensors: header["optimizer"]["groups"][0]["params"].append(9),
    "optimizer's step": lambda header, tensors: header["optimizer"]["state"]["0"].update(step="soon"),
    "optimizer is text": put("optimizer", value="AdamW"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_forged_header_is_refused(name, path):
    forged(path, HEADERS[name])
    refused(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"state/0.bias": torch.ones(2**16)},
        lambda t: t | {"state/0.bias": torch.ones(5, dtype=torch.complex64)},
        lambda t: {name: value for name, value in t.items() if "fxsparse_step" not in name},
        lambda t: t | {"state/fxsparse_step": torch.tensor(-1)},
        lambda t: {
            n: v + 10**6 if n.endswith("indices") else ~v if v.dtype == torch.bool else v
            for n, v in t.items()
        },
    ],
    ids=["longer", "complex", "no step", "negative step", "indices or masks"],
)
@pytest.mark.parametrize("contents", sorted(PLANS), indirect=True)
def test_forged_tensors_are_refused(change, path):
    tensors, header = checkpoint.read(path)
    header.pop("format")
    header.pop("aliases")
    checkpoint.write(path, change(tensors), header)
    refused(path)


def test_every_flipped_bit_is_noticed(path):
    whole, chosen = path.read_bytes(), random.Random(0)
    places = {*range(16), *chosen.sample(range(len(whole)), 200), *range(len(whole) - 8, len(whole))}
    for place in sorted(places):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chosen.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            checkpoint.read(path)
    for length in chosen.sample(range(len(whole)), 50):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            checkpoint.read(path)


def test_other_files_and_places_are_refused(path):
    refused(path, nn.Linear(6, 2), "pass the model that was saved|expected a saved value")
    text = json.dumps({"format": 1})
    for content in (
        pickle.dumps({"a": torch.ones(2)}),
        b"",
        b"{" * 100_000,
        (8).to_bytes(8, "little") + b"[" * 8,
        len(text).to_bytes(8, "little") + text.encode(),
        (2**62).to_bytes(8, "little") + b"{}",
    ):
        path.write_bytes(content)
        refused(path)
    path.unlink()
    refused(path)
    path.symlink_to(path.parent / "nothing")
    refused(path)
    folder = path.parent / "folder"
    folder.mkdir()
    refused(folder)


def twice(text: str) -> str:
    return text.replace('"kind":', '"kind": "inference", "kind":', 1)


def deep(text: str) -> str:
    return text[:-1] + ', "bomb": ' + "[" * 200_000 + "]" * 200_000 + "}"


def listed(text: str) -> str:
    return f"[{text}]"


def aliased(text: str) -> str:
    return text.replace('"aliases": {}', '"aliases": {"a": "no such tensor"}')


@pytest.mark.parametrize("change", [twice, deep, listed, aliased])
def test_headers_that_json_readers_disagree_on_are_refused(change, path, monkeypatch):
    plain = json.dumps
    monkeypatch.setattr(checkpoint.json, "dumps", lambda value: change(plain(value)))
    forged(path, lambda header, tensors: None)
    monkeypatch.undo()
    refused(path, match="its header is damaged")


def test_a_device_that_is_not_there_is_refused_by_name(path):
    for device in ("xyz", "cuda:99", 3.5, "meta"):
        with pytest.raises(PlanError, match="load: expected a device"):
            fxsparse.load(path, net(), device=device)


class Twins(nn.Module):
    """What it computes depends on whether its inputs are one tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x, y):
        return self.layer(x) + (0 if y is x else y)


def test_a_loaded_module_asks_of_its_inputs_what_the_saved_one_did(tmp_path):
    plan = Plan(sparsity=0.5, method=static("random"), storage="masked")
    for k, inputs in enumerate([(X, X), (X, X.clone())]):
        sparse = fxsparse.compile(Twins(), plan, example_inputs=inputs)
        fxsparse.save(sparse, tmp_path / str(k))
        loaded = fxsparse.load(tmp_path / str(k), Twins())
        assert torch.equal(loaded(*inputs), sparse(*inputs))
        other = (X, X.clone()) if inputs[0] is inputs[1] else (X, X)
        messages = []
        for module in (sparse, loaded):
            with pytest.raises(fxsparse.FxSparseError, match=r"expected (one|two) tensors? as") as error:
                module(*other)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_a_compact_checkpoint_of_another_dtype_is_refused(tmp_path):
    sparse = fxsparse.compile(net().bfloat16(), PLANS["compact"], example_inputs=X.bfloat16())
    fxsparse.save(sparse, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"got torch.bfloat16 .*model\.to\(torch.bfloat16\)"):
        fxsparse.load(tmp_path / "file", net())
    assert fxsparse.load(tmp_path / "file", net().bfloat16())(X.bfloat16()).dtype == torch.bfloat16

"""Folders that plain transformers and fxsparse both read."""

import dataclasses

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import fxsparse
from fxsparse import Plan, choosing, inference, kernel, pretrained
from fxsparse.choosing import Choice
from fxsparse.errors import CheckpointError, PlanError
from fxsparse.inference import Speed
from fxsparse.methods import static

# PyTorch 2.11 warns of how it copies exported graphs itself.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")

PLAN = Plan(sparsity=0.5, allocation="uniform", method=static("magnitude"), storage="masked")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def sparse_is_faster(monkeypatch):
    def choose(problem, *rest, **options):
        return Choice(kernel.registered()["cpu-csr"], {"dense": 10.0, "cpu-csr": 5.0}, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)
    monkeypatch.setattr(inference, "speed_of", lambda *call: Speed(200.0, 100.0, 2.0))


def test_transformers_loads_the_dense_weights_and_fxsparse_the_sparse_module(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=30, max_position_embeddings=8)
    model = transformers.BertForSequenceClassification(config)
    ids = torch.arange(8).view(2, 4)
    plan = dataclasses.replace(PLAN, exclude=("classifier",))
    sparse = fxsparse.compile(model, plan, example_inputs=({"input_ids": ids},)).eval()
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=({"input_ids": ids},))
    for module in (sparse, fast):
        fxsparse.save_pretrained(module, tmp_path / "folder")
        names = {path.name for path in (tmp_path / "folder").iterdir()}
        assert names == {"config.json", "model.safetensors", "fxsparse.safetensors"}
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "folder")
        want = module(input_ids=ids).logits
        torch.testing.assert_close(plain(ids).logits, want)
        assert (plain.bert.pooler.dense.weight == 0).sum() == 128
        loaded = fxsparse.load_pretrained(tmp_path / "folder")
        assert torch.equal(loaded(input_ids=ids).logits, want)
    (tmp_path / "folder" / "config.json").write_text(
        '{"architectures": ["AutoConfig"], "model_type": "bert"}'
    )
    with pytest.raises(CheckpointError, match=r"expected a config.json that names a model of transformers"):
        fxsparse.load_pretrained(tmp_path / "folder")


def net(*inner):
    return nn.Sequential(nn.Linear(8, 6), *inner, nn.ReLU(), nn.Linear(6, 2))


def test_other_models_are_given_to_load(tmp_path):
    sparse = fxsparse.compile(net(), PLAN, example_inputs=X)
    fxsparse.save_pretrained(sparse, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    plain = net()
    plain.load_state_dict(weights, strict=True)
    torch.testing.assert_close(plain(X), sparse(X))
    assert torch.equal(fxsparse.load_pretrained(tmp_path, net())(X), sparse(X))
    with pytest.raises(CheckpointError, match=r"Pass the model: load_pretrained\(folder, model\)"):
        fxsparse.load_pretrained(tmp_path)


def test_what_has_no_dense_form_of_the_users_shapes_is_refused(tmp_path):
    model = net(nn.BatchNorm1d(6)).eval()
    with torch.no_grad():
        model[0].weight[:3] = 0
    fast = fxsparse.compile(model, mode="infer", example_inputs=X)
    with pytest.raises(PlanError, match=r"save_pretrained: expected '.*' with the shape .* removed neurons"):
        fxsparse.save_pretrained(fast, tmp_path / "folder")
    with pytest.raises(PlanError, match=r"save_pretrained: expected what fxsparse.compile returned"):
        fxsparse.save_pretrained(model, tmp_path / "folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a folder that may be written"):
        fxsparse.save_pretrained(fxsparse.compile(net(), PLAN, example_inputs=X), tmp_path / "file")


def test_a_disk_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*call):
        raise SafetensorError("No space left on device")

    sparse = fxsparse.compile(nn.Sequential(nn.Linear(8, 8)), PLAN, example_inputs=(X,))
    monkeypatch.setattr(pretrained, "save_model", full)
    with pytest.raises(CheckpointError, match="with room for the model, got No space left"):
        fxsparse.save_pretrained(sparse, tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())

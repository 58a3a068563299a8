"""What ``torch.nn.utils.prune`` left on a model is folded for inference, and the model keeps it."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fxsparse
from fxsparse import choosing, inference, kernel
from fxsparse.choosing import Choice
from fxsparse.inference import Speed
from fxsparse.pruning_hooks import note_of, without_pruning_hooks


def pruned() -> nn.Sequential:
    """A linear layer with two rounds of pruning and a pruned bias, and a plain one."""
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_structured(model[0], "weight", 0.25, dim=0)
    prune.random_unstructured(model[0], "bias", 0.5)
    return model.eval()


def test_the_copy_has_plain_weights_and_computes_the_same() -> None:
    model, x = pruned(), torch.randn(3, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded, names = without_pruning_hooks(model)
    assert sorted(names) == ["0.bias", "0.weight"]
    assert set(folded.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert torch.equal(folded(x), model(x))
    assert torch.equal(folded[0].weight, model[0].weight_orig * model[0].weight_mask)
    assert folded[2].weight is model[2].weight
    assert not prune.is_pruned(folded)
    assert prune.is_pruned(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_weights_of_a_recurrent_layer_are_those_it_computes_with() -> None:
    model, x = nn.GRU(4, 4), torch.randn(5, 2, 4)
    prune.l1_unstructured(model, "weight_hh_l0", 0.5)
    folded, names = without_pruning_hooks(model)
    assert names == ["weight_hh_l0"]
    assert torch.equal(folded(x)[0], model(x)[0])
    assert folded._flat_weights[1] is folded.weight_hh_l0


def test_a_model_without_such_hooks_is_returned_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_pre_hook(lambda module, x: None)
    assert without_pruning_hooks(model) == (model, [])


def test_inference_runs_the_layer_sparse_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(problem, x, weight, bias=None, activation="none", **options) -> Choice:
        return Choice(kernel.registered()["cpu-csr"], {"dense": 20.0, "cpu-csr": 10.0}, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)
    monkeypatch.setattr(inference, "speed_of", lambda *call: Speed(200.0, 100.0, 2.0))
    model, x = pruned(), torch.randn(3, 16)
    fast = fxsparse.compile(model, mode="infer", example_inputs=x)
    rows = {row["name"]: row["kernel"] for row in fast.report.layers}
    assert rows == {"0.weight": "cpu-csr", "2.weight": "dense"}
    assert "masks of torch.nn.utils.prune are folded into 0.weight, 0.bias" in fast.report.notes
    torch.testing.assert_close(fast(x), model(x))
    assert prune.is_pruned(model)


def test_the_note_is_short() -> None:
    assert note_of([str(k) for k in range(7)]).endswith("folded into 0, 1, 2, 3, 4 and 2 more")

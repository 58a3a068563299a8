"""Weights that masks or parametrizations compute are plain ones for inference, and the model keeps what it has."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning import FakeSparsity
from torch.nn.utils import parametrizations, parametrize, prune

import fxsparse
from fxsparse import choosing, inference, kernel
from fxsparse.choosing import Choice
from fxsparse.errors import UnsupportedError
from fxsparse.inference import Speed
from fxsparse.plain_weights import with_plain_weights


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
    folded, notes = with_plain_weights(model)
    assert notes == ["masks of torch.nn.utils.prune are folded into 0.weight, 0.bias"]
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
    folded, notes = with_plain_weights(model)
    assert notes == ["masks of torch.nn.utils.prune are folded into weight_hh_l0"]
    assert torch.equal(folded(x)[0], model(x)[0])
    assert folded._flat_weights[1] is folded.weight_hh_l0


def test_a_model_without_such_hooks_is_returned_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_pre_hook(lambda module, x: None)
    assert with_plain_weights(model) == (model, [])


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
    model = nn.Sequential(*[prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5) for _ in range(7)])
    (note,) = with_plain_weights(model)[1]
    assert note.endswith("folded into 0.weight, 1.weight, 2.weight, 3.weight, 4.weight and 2 more")


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.arange(16 * 12).reshape(12, 16) % 5 == 0)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def masked(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Masked())


def with_both_parametrized(layer: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return parametrizations.weight_norm(layer)


PARAMETRIZED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "masked": masked,
    "weight and bias": with_both_parametrized,
}


def parametrized(how: Callable[[nn.Linear], nn.Module]) -> nn.Sequential:
    return nn.Sequential(how(nn.Linear(16, 12)), nn.ReLU(), nn.Linear(12, 4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_parametrized_weights_are_what_they_are_in_evaluation(
    how: Callable[[nn.Linear], nn.Module], training: bool
) -> None:
    model, x = parametrized(how).train(training), torch.randn(3, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded, (note,) = with_plain_weights(model)
    assert note.startswith("parametrizations are folded into 0.")
    assert "0.weight" in note
    assert type(folded[0]) is nn.Linear
    assert set(folded.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert parametrize.is_parametrized(model[0])
    assert model.training is training is model[0].parametrizations.training
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert torch.equal(folded.eval()(x), model.eval()(x))


def test_a_parametrization_that_is_random_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", Noisy())
    folded, notes = with_plain_weights(model)
    assert notes == []
    assert parametrize.is_parametrized(folded[0])


def test_a_parametrized_buffer_stays_a_buffer() -> None:
    model = nn.BatchNorm1d(4)
    parametrize.register_parametrization(model, "running_mean", nn.Tanh())
    folded, _ = with_plain_weights(model.eval())
    assert set(dict(folded.named_buffers())) == {"running_mean", "running_var", "num_batches_tracked"}
    x = torch.randn(3, 4)
    assert torch.equal(folded(x), model(x))


ALL = {"pruned": pruned, **{name: partial(parametrized, how) for name, how in PARAMETRIZED.items()}}


@pytest.mark.parametrize("build", ALL.values(), ids=ALL)
def test_what_was_folded_saves_loads_copies_and_pickles(
    build: Callable[[], nn.Sequential], tmp_path: Path
) -> None:
    model, x = build().eval(), torch.randn(3, 16)
    fast = fxsparse.compile(model, mode="infer", example_inputs=x)
    want = fast(x)
    torch.testing.assert_close(want, model(x))
    fxsparse.save(fast, tmp_path / "model.fxs")
    assert torch.equal(fxsparse.load(tmp_path / "model.fxs", build())(x), want)
    assert torch.equal(fxsparse.load(tmp_path / "model.fxs", build().to("meta"))(x), want)
    plain, _ = with_plain_weights(build())
    assert torch.equal(fxsparse.load(tmp_path / "model.fxs", plain)(x), want)
    assert torch.equal(copy.deepcopy(fast)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(fast))(x), want)


def test_a_pruned_convolution_loads(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(2, 3, 9, 9)
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.9)
    fast = fxsparse.compile(model.eval(), mode="infer", example_inputs=x)
    fxsparse.save(fast, tmp_path / "model.fxs")
    assert torch.equal(fxsparse.load(tmp_path / "model.fxs", model)(x), fast(x))


def test_a_parametrized_module_in_training_does_not_pickle_and_says_what_does(tmp_path: Path) -> None:
    model, x = parametrized(parametrizations.weight_norm), torch.randn(3, 16)
    plan = fxsparse.Plan(sparsity=0.5)
    sparse = fxsparse.compile(model, plan, example_inputs=x)
    with pytest.raises(UnsupportedError, match=r"got '0', a ParametrizedLinear.*fxsparse.save"):
        pickle.dumps(sparse)
    fxsparse.save(sparse, tmp_path / "model.fxs")
    assert torch.equal(fxsparse.load(tmp_path / "model.fxs", model)(x), sparse(x))


def test_a_mask_that_no_state_dict_holds_is_saved(tmp_path: Path) -> None:
    def prepared(mask: Tensor) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
        parametrize.register_parametrization(model[0], "weight", FakeSparsity(mask))
        return model

    mask, x = torch.rand(12, 16) < 0.5, torch.randn(3, 16)
    model = prepared(mask)
    assert not any("mask" in name for name in model.state_dict())
    sparse = fxsparse.compile(model, fxsparse.Plan(sparsity=0.5), example_inputs=x)
    fxsparse.save(sparse, tmp_path / "model.fxs")
    loaded = fxsparse.load(tmp_path / "model.fxs", prepared(torch.zeros_like(mask)))
    assert torch.equal(loaded(x), sparse(x))
    assert torch.equal(loaded.get_buffer("0.parametrizations.weight.0.mask"), mask)


def test_a_mask_of_prune_in_training_says_how_to_make_it_a_parameter() -> None:
    sparse = fxsparse.compile(pruned(), fxsparse.Plan(sparsity=0.5), example_inputs=torch.randn(3, 16))
    reasons = {row["name"]: row["reason"] for row in sparse.report.untouched}
    assert "torch.nn.utils.prune.remove makes it a Parameter again" in reasons["0.weight_orig"]

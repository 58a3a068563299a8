"""Quantities by weight: both storages, transposed and soft weights, and the table."""

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.analysis import SpectralHistory, spectral, spectral_layers, spectral_table
from fxsparse.errors import PlanError
from fxsparse.methods import rigl, spartan, static

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Transposed(nn.Module):
    """A projection whose weight is stored [in, out], as GPT-2's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 24))
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def network():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=2), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(24 * 16, 64), nn.ReLU(), nn.Linear(64, 10))


def compiled(storage, method=None, sparsity=0.7):
    plan = Plan(sparsity=sparsity, storage=storage, method=method or static("random"), allocation="uniform")
    return fxsparse.compile(network(), plan, example_inputs=(X,))


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_every_weight_is_measured_by_its_mask_and_values(storage):
    sparse = compiled(storage)
    found = spectral_layers(sparse)
    weights, masks = sparse.dense_state_dict(), sparse.masks()
    assert list(found) == list(masks) == ["0.weight", "2.weight", "5.weight", "7.weight"]
    assert found == {name: spectral(masks[name], weights[name]) for name in masks}
    assert found["2.weight"].shape == (24, 8 * 9)
    assert found["5.weight"].full_spectrum_distance > 0


def test_names_limit_what_is_measured():
    sparse = compiled("masked")
    assert list(spectral_layers(sparse, ["5.weight"])) == ["5.weight"]
    with pytest.raises(PlanError, match="no sparse weight 'x'"):
        spectral_layers(sparse, ["x"])
    assert list(spectral_layers(sparse, "5.weight")) == ["5.weight"]


def test_a_model_that_was_not_compiled_is_refused():
    for other in (nn.Linear(4, 4), torch.ones(4, 4)):
        with pytest.raises(
            PlanError, match=f"expected what fxsparse.compile returned, got {type(other).__name__};"
        ):
            SpectralHistory().record(other)  # pyright: ignore[reportArgumentType]


def test_outputs_of_a_transposed_weight_are_its_columns():
    model = Transposed()
    x = torch.randn(2, 40)
    plan = Plan(sparsity=0.5, storage="masked", method=static("random"))
    sparse = fxsparse.compile(model, plan, example_inputs=(x,))
    (found,) = spectral_layers(sparse).values()
    assert found.shape == (24, 40)
    assert found == spectral(sparse.masks()["weight"].T, model.weight.T)


def test_soft_masks_are_multiplied_into_the_weights():
    sparse = compiled("masked", spartan(steps=10))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    for _ in range(4):
        sparse(X).square().mean().backward()
        optimizer.step()
    name = "5.weight"
    (found,) = spectral_layers(sparse, [name]).values()
    mask, folded = sparse.masks()[name], sparse.dense_state_dict()[name]
    stored = dict(sparse.named_parameters())[name]
    assert not torch.equal(folded[mask], stored[mask])
    assert found == spectral(mask, folded)


def test_a_module_for_inference_has_no_masks():
    fast = fxsparse.compile(compiled("masked"), mode="infer", example_inputs=(X,))
    with pytest.raises(PlanError, match="compiled for inference"):
        spectral_layers(fast)


def test_the_table_has_a_line_for_each_weight_and_their_means():
    found = spectral_layers(compiled("masked", rigl(every=2, stop=8), sparsity=0.9))
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in _lines(found)]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert [row["weight"] for row in rows] == [*found, "mean"]
    assert rows[2]["matrix"] == "64x384"
    assert rows[2]["Ramanujan gap"] == f"{found['5.weight'].ramanujan_gap:.4g}"
    assert rows[0]["Ramanujan gap"] == "—"
    assert rows[0]["skipped"].startswith("mean degree of the inputs is ")
    known = [one.ramanujan_gap for one in found.values() if one.ramanujan_gap is not None]
    assert 0 < len(known) < len(found)
    assert rows[-1]["Ramanujan gap"] == f"{sum(known) / len(known):.4g}"


def test_a_table_of_nothing_has_its_titles():
    assert spectral_table({}).startswith("weight")


def _lines(found):
    return spectral_table(found, style="github").splitlines()

"""Where an update's evidence comes from (eval mode, closures), and that no optimizer step is lost without any."""

import copy

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError, UnsupportedError
from fxsparse.methods import gse, rigl, set_, static

METHODS = {
    "gse": lambda **o: gse(every=2, stop=100, drop_fraction=0.5, decay="constant", **o),
    "grabo": lambda **o: gse(every=2, stop=100, drop_fraction=0.5, decay="constant", sampling="grabo", **o),
    "rigl": lambda **o: rigl(every=2, stop=100, drop_fraction=0.5, decay="constant", **o),
}
STORAGES = ["masked", "compact"]


class Net(nn.Module):
    """Its train graph and its eval graph differ; `opaque` leaves only the module walk."""

    def __init__(self, opaque=False, rate=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.opaque = opaque
        self.layers = nn.Sequential(
            nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(rate), nn.Linear(24, 8)
        ).double()

    def forward(self, x):
        return self.layers(x) if not self.opaque or float(x.sum()) < 1e9 else x


def build(method, storage="compact", optimizer=torch.optim.AdamW, *, opaque=False, rate=0.5):
    sparse = fxsparse.compile(Net(opaque, rate), Plan(sparsity=0.7, storage=storage, method=method))
    made = optimizer(sparse.parameters(), lr=0.01)
    sparse.attach(made)
    return sparse, made


def loss(sparse, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    return nn.functional.cross_entropy(sparse(x), torch.randint(8, (12,), generator=generator))


def step(sparse, optimizer, seed):
    optimizer.zero_grad()
    loss(sparse, seed).backward()
    optimizer.step()


def step_by_closure(sparse, optimizer, seed, keyword=False):
    def closure():
        optimizer.zero_grad()
        value = loss(sparse, seed)
        value.backward()
        return value

    return optimizer.step(closure=closure) if keyword else optimizer.step(closure)


def equal(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def moved(sparse, start):
    return any(not torch.equal(mask, start[name]) for name, mask in sparse.masks().items())


@pytest.mark.parametrize("variant", ["paper", "torch"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_masks_move_in_eval_mode_by_the_true_gradients(method, variant):
    masked, compact = build(method(variant=variant), "masked"), build(method(variant=variant), "compact")
    walked = build(method(variant=variant), "masked", opaque=True)
    start = masked[0].masks()
    for at in range(7):
        for sparse, optimizer in (masked, compact, walked):
            step(sparse.eval(), optimizer, at)
        for other in (compact[0], walked[0]):
            assert all(torch.equal(mask, other.masks()[name]) for name, mask in masked[0].masks().items())
    assert moved(masked[0], start)
    grown = masked[0].masks()["layers.0.weight"] & ~start["layers.0.weight"]
    assert grown.any()


def test_a_copy_moves_its_masks_in_eval_mode_too():
    sparse, optimizer = build(METHODS["gse"]())
    twin = copy.deepcopy(sparse)
    other = torch.optim.AdamW(twin.parameters(), lr=0.01)
    twin.attach(other)
    start = twin.masks()
    for at in range(5):
        step(sparse.eval(), optimizer, at)
        step(twin.eval(), other, at)
    assert moved(twin, start)
    assert equal(sparse, twin)


def test_evaluation_without_gradients_runs_the_plain_graph():
    sparse, optimizer = build(METHODS["gse"]())
    for at in range(2):
        step(sparse, optimizer, at)
    graphs = sparse._emitted.program.graphs
    assert sparse.forward_graph is graphs["probe"]
    assert sparse.eval().forward_graph is graphs["probe_eval"]
    with torch.no_grad():
        assert sparse.forward_graph is graphs["eval"]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("variant", ["paper", "torch"])
def test_an_update_without_evidence_says_so_and_takes_the_step(storage, variant):
    sparse, optimizer = build(METHODS["gse"](variant=variant), storage)
    fires = 2 if variant == "paper" else 1
    for at in range(fires):
        step(sparse, optimizer, at)
    optimizer.zero_grad()
    bias = sparse.get_parameter("layers.4.bias")
    bias.grad = torch.ones_like(bias)
    before, start = bias.detach().clone(), sparse.masks()
    with pytest.warns(
        UserWarning, match=r"the mask update at step 2 is left out.*expected a forward and a backward"
    ):
        optimizer.step()
    assert not torch.equal(bias, before)
    assert not moved(sparse, start)
    assert sparse.state_dict()["fxsparse_step"] == fires + 1


def test_a_model_whose_sparse_weights_are_frozen_takes_every_step():
    sparse, optimizer = build(METHODS["gse"](), "masked")
    for name in sparse.masks():
        sparse.get_parameter(name).requires_grad_(False)
    for at in range(5):
        before = sparse.get_parameter("layers.4.bias").detach().clone()
        step(sparse, optimizer, at)
        assert not torch.equal(sparse.get_parameter("layers.4.bias"), before)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", [*METHODS.values(), set_], ids=[*METHODS, "set"])
@pytest.mark.parametrize(("optimizer", "keyword"), [(torch.optim.AdamW, False), (torch.optim.SGD, True)])
@pytest.mark.parametrize("variant", ["paper", "torch"])
def test_a_closure_gives_the_run_that_a_backward_before_the_step_gives(
    method, storage, optimizer, keyword, variant
):
    made = method(every=2) if method is set_ else method(variant=variant)
    plain, first = build(made, storage, optimizer, rate=0.0)
    closed, second = build(made, storage, optimizer, rate=0.0)
    start = closed.masks()
    for at in range(7):
        step(plain, first, at)
        value = step_by_closure(closed, second, at, keyword)
        assert value is not None
        assert equal(plain, closed)
    assert moved(closed, start)


def test_a_closure_goes_by_what_was_explored():
    runs = [build(METHODS["gse"](), rate=0.0) for _ in range(2)]
    for at in range(5):
        for (sparse, optimizer), take in zip(runs, (step, step_by_closure), strict=True):
            if at == 1:
                with sparse.exploring():
                    loss(sparse, 9).backward()
            take(sparse, optimizer, at)
    assert equal(runs[0][0], runs[1][0])


class Twice(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        assert closure is not None
        closure()
        return closure()


def test_optimizers_that_cannot_follow_are_refused_by_name():
    with pytest.raises(UnsupportedError, match="LBFGS keeps a history of all parameters as one vector"):
        build(METHODS["gse"](), optimizer=torch.optim.LBFGS)
    sparse, optimizer = build(static("magnitude"), optimizer=torch.optim.LBFGS)
    before = loss(sparse.eval(), 0).item()
    step_by_closure(sparse, optimizer, 0)
    assert loss(sparse, 0).item() < before
    sparse, optimizer = build(METHODS["gse"](), optimizer=Twice)
    for at in range(2):
        step_by_closure(sparse, optimizer, at)
    with pytest.raises(UnsupportedError, match=r"Twice calls the closure of step\(\) more than once"):
        step_by_closure(sparse, optimizer, 2)


def test_steps_and_blocks_within_exploring_are_refused_and_change_nothing():
    sparse, optimizer = build(METHODS["gse"]())
    step(sparse, optimizer, 0)
    loss(sparse, 1).backward()
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    for call in (optimizer.step, lambda: sparse.update_masks(optimizer)):
        with pytest.raises(PlanError, match=r"optimizer\.step\(\) within exploring"), sparse.exploring():
            call()
    with pytest.raises(PlanError, match="no block within another"), sparse.exploring(), sparse.exploring():
        pass
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())
    for at in range(1, 4):
        step(sparse, optimizer, at)
    assert sparse.state_dict()["fxsparse_step"] == 4

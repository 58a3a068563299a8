"""Weights whose zeros lie in blocks, as nonzeros: the run of masked storage, by entries and by blocks."""

import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import CheckpointError, PatternError
from fxsparse.methods import rigl, set_, static
from fxsparse.module import SparseModule
from fxsparse.pattern import Block
from fxsparse.selection import MaskChange
from fxsparse.storage import CompactWeight

METHODS = {
    "rigl": lambda: rigl(every=3, stop=1000, drop_fraction=0.5),
    "set": lambda: set_(every=3, drop_fraction=0.5),
    "static": static,
}


class Net(nn.Module):
    """One weight is applied twice, to tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.out = nn.Linear(32, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 96)

    def forward(self, x):
        return self.out(self.twice(self.twice(self.first(x).relu()).relu()).relu())


def compiled(storage, method, pattern, model=None):
    torch.manual_seed(0)
    plan = Plan(sparsity=0.6, pattern=pattern, storage=storage, method=method)
    return fxsparse.compile(Net().double() if model is None else model, plan)


def in_blocks(sparse: SparseModule) -> SparseModule:
    """As a module comes from a machine with a GPU, where the kernel of blocks was taken."""
    build, (recipe, *rest) = copy.deepcopy(sparse).__reduce__()
    decisions = {
        name: replace(decision, kernel="cuda-bsr-train", format="bsr")
        for name, decision in recipe.decisions.items()
    }
    return build(replace(recipe, decisions=decisions), *rest)


def train(sparse, steps=12, shape=(4, 3, 32)):
    """The losses, and the masks after every step."""
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    sparse.attach(optimizer)
    generator, losses, masks = torch.Generator().manual_seed(1), [], []
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        loss = F.mse_loss(sparse(x), torch.randn(*shape[:-1], 96, generator=generator, dtype=torch.float64))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        masks.append(sparse.masks())
    return losses, masks


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", [Block(16, 16), Block(32, 16), Block(4, 2)])
def test_entries_and_blocks_train_as_masked_weights_do(name, pattern):
    method = METHODS[name]
    modules = [compiled("masked", method(), pattern), compiled("compact", method(), pattern)]
    if pattern != Block(4, 2):
        modules.append(in_blocks(modules[1]))
    losses, masks = zip(*(train(sparse) for sparse in modules), strict=True)
    assert (name == "static") == all(torch.equal(masks[0][0][key], masks[0][-1][key]) for key in masks[0][0])
    for other, history in zip(losses[1:], masks[1:], strict=True):
        torch.testing.assert_close(other, losses[0], rtol=1e-9, atol=0)
        for step, chosen in enumerate(history):
            assert all(torch.equal(mask, masks[0][step][key]) for key, mask in chosen.items())
    for mask in masks[0][-1].values():
        pattern.check(mask)
    dense = [dict(sparse.to_dense().named_parameters()) for sparse in modules]
    for other in dense[1:]:
        torch.testing.assert_close(other, dense[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_convolutions_of_blocks_train_as_masked_ones_do(name):
    pattern, masks = Block(4, 2), {}
    for storage in ("masked", "compact"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
        sparse = compiled(storage, METHODS[name](), pattern, model.double())
        assert {row["storage"] for row in sparse.report.layers} == {storage}
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
        sparse.attach(optimizer)
        for _ in range(7):
            optimizer.zero_grad()
            sparse(torch.randn(3, 4, 6, 5, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        masks[storage] = sparse.masks()
    assert all(torch.equal(mask, masks["masked"][key]) for key, mask in masks["compact"].items())
    for mask in masks["compact"].values():
        pattern.check(mask)


def test_the_report_says_how_a_weight_trains():
    rows = compiled("compact", static(), Block(16, 16)).report.layers
    assert {(row["storage"], row["kernel"]) for row in rows} == {("compact", "cpu-csr-train")}
    sparse = in_blocks(compiled("compact", static(), Block(32, 16)))
    assert {(row["storage"], row["kernel"]) for row in sparse.report.layers} == {
        ("compact", "cuda-bsr-train")
    }
    weights = [module for module in sparse.modules() if isinstance(module, CompactWeight)]
    assert len(weights) == 3
    assert all("blocks of 16 x 16" in str(weight) for weight in weights)


def test_an_update_writes_into_the_same_memory_and_a_checkpoint_is_that_of_entries():
    entries = compiled("compact", rigl(every=2, stop=1000), Block(16, 16))
    blocks = in_blocks(entries)
    assert blocks.state_dict().keys() == entries.state_dict().keys()
    held = {name: (buffer.data_ptr(), buffer.clone()) for name, buffer in blocks.named_buffers()}
    train(blocks, 5)
    after = dict(blocks.named_buffers())
    assert all(after[name].data_ptr() == place for name, (place, _) in held.items())
    assert not torch.equal(after["first.weight.block_columns"], held["first.weight.block_columns"][1])
    train(entries, 9)
    assert any(not torch.equal(mask, blocks.masks()[name]) for name, mask in entries.masks().items())
    blocks.load_state_dict(entries.state_dict())
    x = torch.randn(3, 32, dtype=torch.float64)
    torch.testing.assert_close(blocks(x), entries(x))
    file = io.BytesIO()
    torch.save(blocks.state_dict(), file)
    file.seek(0)
    again = in_blocks(compiled("compact", rigl(every=2, stop=1000), Block(16, 16)))
    again.load_state_dict(torch.load(file))
    torch.testing.assert_close(again(x), entries(x))


def test_a_state_dict_with_entries_outside_of_blocks_changes_nothing():
    blocks = in_blocks(compiled("compact", static(), Block(16, 16)))
    before = {
        name: tensor.clone() for name, tensor in (*blocks.state_dict().items(), *blocks.named_buffers())
    }
    state = {name: tensor.clone() for name, tensor in blocks.state_dict().items()}
    mask = blocks.masks()["first.weight"].flatten()
    mask[mask.nonzero()[0]], mask[(~mask).nonzero()[0]] = False, True
    state["first.weight.indices"] = torch.stack(mask.view(64, 32).nonzero().int().unbind(1))
    message = r"first.weight.indices are broken: expected \d+ entries that fill blocks of 16 x 16 in the 64 x 32 weight"
    with pytest.raises(CheckpointError, match=message):
        blocks.load_state_dict(state)
    after = dict((*blocks.state_dict().items(), *blocks.named_buffers()))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_copies_and_compiled_graphs_compute_the_same():
    sparse = in_blocks(compiled("compact", static(), Block(16, 16)))
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    calls = [sparse, copy.deepcopy(sparse), torch.compile(sparse, backend="aot_eager", fullgraph=True)]
    results = []
    for call in calls:
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_single_precision_and_moves_the_same_masks(dtype):
    method = rigl(every=1, stop=1000, drop_fraction=0.5)
    modules = [
        compiled("masked", method, Block(16, 16), Net()),
        compiled("compact", method, Block(16, 16), Net()),
    ]
    modules[1] = in_blocks(modules[1])
    x = torch.randn(8, 32)
    for sparse in modules:
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01)
        sparse.attach(optimizer)
        with torch.autocast("cpu", dtype):
            loss = sparse(x).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in sparse.parameters())
        optimizer.step()
    masks = [sparse.masks() for sparse in modules]
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_a_frozen_weight_gets_no_gradient():
    model = Net().double()
    model.twice.weight.requires_grad_(False)
    sparse = in_blocks(compiled("compact", static(), Block(16, 16), model))
    sparse(torch.randn(2, 32, dtype=torch.float64)).sum().backward()
    assert sparse.get_parameter("twice.weight.values").grad is None
    assert sparse.get_parameter("first.weight.values").grad is not None


def test_entries_that_fill_no_blocks_are_refused():
    with pytest.raises(
        PatternError, match=r"expected 4 entries that fill blocks of 2 x 2 in the 4 x 4 weight"
    ):
        CompactWeight((4, 4), torch.tensor([0, 1, 4, 6]), torch.ones(4), side=2)
    with pytest.raises(PatternError, match=r"expected 8 entries that fill blocks of 2 x 2"):
        CompactWeight((4, 4), torch.tensor([0, 1, 4, 5]), torch.ones(4), capacity=8, side=2)
    weight = CompactWeight((4, 4), torch.tensor([2, 3, 6, 7]), torch.arange(4.0), side=2)
    assert weight.get_buffer("block_to_blocks").tolist() == [[[0, 2], [1, 3]]]
    assert weight.get_buffer("block_to_entries").tolist() == [0, 2, 1, 3]
    before = {name: buffer.clone() for name, buffer in weight.named_buffers()}
    with pytest.raises(PatternError, match=r"expected 4 entries that fill blocks of 2 x 2"):
        weight.move(MaskChange.between(weight.active(), torch.tensor([2, 3, 6, 9])), None)
    assert all(torch.equal(buffer, before[name]) for name, buffer in weight.named_buffers())

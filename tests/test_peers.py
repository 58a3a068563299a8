"""Bugs that hit users of other sparsity libraries: docs/peers.md names the test that holds each one here.

Below the check of that page stand the tests that fit nowhere else.
"""

import ast
import copy
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import prune

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.methods import rigl, set_, static

ROOT = Path(__file__).resolve().parents[1]
ROWS = dict(re.findall(r"^\| (\d+\.\d+) \| (.*) \|$", (ROOT / "docs" / "peers.md").read_text(), re.MULTILINE))
SECTIONS = {
    0: 1,
    1: 5,
    2: 7,
    3: 9,
    4: 6,
    5: 7,
    6: 10,
    7: 6,
    8: 5,
    9: 9,
    10: 10,
    11: 5,
    12: 6,
    13: 9,
    14: 3,
    15: 6,
    16: 8,
}
"""{section of the survey: how many bugs and wishes it has}"""
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMED_OTHERWISE = {"sklearn": "scikit-learn", "tomli_w": "tomli-w"}


def names(requirements):
    return {re.split(r"[^\w-]", entry)[0] for entry in requirements}


def sources():
    folders = [ROOT / "fxsparse", ROOT / "passes", ROOT / "kernels"]
    return [path for folder in folders for path in folder.rglob("*.py") if not path.parent.is_symlink()]


def imports(path):
    """Dotted names of modules that are imported anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_every_row_of_the_survey_is_on_the_page():
    assert list(ROWS) == [f"{section}.{row + 1}" for section, rows in SECTIONS.items() for row in range(rows)]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_tests_that_exist_or_says_why_it_does_not_apply(row):
    _, here = ROWS[row].split(" | ")
    tests = re.findall(r"`(tests/[^`]+)`", here)
    assert tests or here.startswith("Does not apply: ")
    for test in tests:
        file, _, name = test.partition("::")
        assert not name or f"\ndef {name}(" in (ROOT / file).read_text(), test
        assert (ROOT / file).exists(), test


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
RIGL = rigl(every=2, stop=100, variant="torch")


def train(sparse, steps=5, call=None):
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01, weight_decay=0.1)
    sparse.attach(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        (sparse if call is None else call)(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_rewinding_to_the_first_weights_keeps_the_masks_that_were_found(storage):
    first = net().state_dict()
    sparse = fxsparse.compile(net(), Plan(sparsity=0.8, storage=storage, method=RIGL))
    start = sparse.masks()
    train(sparse)
    masks = sparse.masks()
    assert any(not torch.equal(mask, start[name]) for name, mask in masks.items())
    sparse.load_state_dict(first)
    assert all(torch.equal(mask, masks[name]) for name, mask in sparse.masks().items())
    rewound = sparse.dense_state_dict()
    assert all(torch.equal(rewound[name], first[name] * masks.get(name, 1)) for name in first)


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_zeros_that_prune_remove_leaves_stay_zero_in_fine_tuning(storage):
    model = net()
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", amount=0.75)
        prune.remove(layer, "weight")
    zeros = {name: value == 0 for name, value in model.state_dict().items() if value.dim() > 1}
    method, counts = static("magnitude"), {"0.weight": 128, "2.weight": 64}
    sparse = fxsparse.compile(model, Plan(sparsity=0.75, allocation=counts, storage=storage, method=method))
    before = sparse.dense_state_dict()
    train(sparse)
    after = sparse.dense_state_dict()
    assert all(torch.equal(after[name] == 0, zeros[name]) for name in zeros)
    assert all(not torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("mode", ["train", "infer"])
@torch._dynamo.config.patch(recompile_limit=2)
def test_torch_compile_takes_more_modules_in_a_process_than_it_recompiles_one_function(mode):
    torch._dynamo.reset()
    counter, x = CompileCounterWithBackend("eager"), torch.randn(4, 16)
    for _ in range(3):
        block = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        if mode == "train":
            sparse = fxsparse.compile(block, Plan(sparsity=0.5))
        else:
            sparse = fxsparse.compile(block, mode="infer", example_inputs=(x,))
        with torch.set_grad_enabled(mode == "train"):
            y = torch.compile(sparse, backend=counter, fullgraph=True)(x)
            torch.testing.assert_close(y, sparse(x))
        x = y.detach()
    assert counter.frame_count == 3


class OfStrides(nn.Module):
    """A weight that is stored by columns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(16, 32).t())
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        return self.head(F.linear(x, self.weight).relu())


def test_a_weight_that_is_not_contiguous_trains_alike_in_both_storages():
    found = {}
    for storage in ("masked", "compact"):
        model = OfStrides()
        assert not model.weight.is_contiguous()
        sparse = fxsparse.compile(model, Plan(sparsity=0.8, storage=storage, method=RIGL))
        before = sparse.masks()["weight"]
        train(sparse)
        found[storage] = sparse.masks()["weight"]
        assert found[storage].sum() == before.sum()
        assert not torch.equal(found[storage], before)
        torch.testing.assert_close(sparse.to_dense()(X), sparse(X))
    assert torch.equal(found["masked"], found["compact"])


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_a_module_that_trains(off):
    model = net()
    with off():
        sparse = fxsparse.compile(model, Plan(sparsity=0.8, method=RIGL), example_inputs=(X.clone(),))
    before = sparse.masks()
    train(sparse)
    assert any(not torch.equal(mask, before[name]) for name, mask in sparse.masks().items())


def test_pruning_again_to_the_same_sparsity_prunes_nothing_more():
    once = fxsparse.prune(net(), Plan(sparsity=0.3))
    twice = fxsparse.prune(copy.deepcopy(once), Plan(sparsity=0.3))
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    assert sum(int((weight == 0).sum()) for weight in twice.parameters()) == 768 - int(0.7 * 768)


@pytest.mark.parametrize("kind", ["masked", "compact", "infer"])
def test_torch_export_takes_what_was_compiled(kind):
    if kind == "infer":
        module = fxsparse.compile(
            fxsparse.prune(net(), Plan(sparsity=0.9)), mode="infer", example_inputs=(X,)
        )
    else:
        module = fxsparse.compile(net(), Plan(sparsity=0.9, storage=kind), example_inputs=(X,)).eval()
    torch.testing.assert_close(torch.export.export(module, (X,)).module()(X), module(X))


def test_names_under_a_wrapper_are_refused_with_those_that_are_there():
    wrapped = nn.ModuleDict({"module": net()})
    with pytest.raises(PlanError, match=r"exclude glob '2' matches no parameter; nearest names: \['module"):
        fxsparse.compile(wrapped, Plan(sparsity=0.8, exclude=("2",)))


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_module_trains_under_torch_compile(group):
    # Torch 2.11 cannot trace an autograd.Function over shards, which growth by dense gradients needs: hence SET.
    sparse = fxsparse.compile(net(), Plan(sparsity=0.8, method=set_(every=2, stop=100)))
    fully_shard(sparse, mesh=init_device_mesh("cpu", (1,)))
    counter = CompileCounterWithBackend("eager")
    before = sparse.masks()
    train(sparse, call=torch.compile(sparse, backend=counter))
    assert counter.frame_count > 0
    for name, mask in sparse.masks().items():
        assert mask.sum() == before[name].sum()
        assert not torch.equal(mask, before[name])


@pytest.mark.filterwarnings(
    "ignore:FSDP is switching to use `NO_SHARD`"
)  # one process has nothing to shard with
def test_flat_parameters_are_refused_with_the_way(group):
    flat = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    with pytest.raises(PlanError, match=r"wrapped in FullyShardedDataParallel: .* then wrap: fully_shard"):
        fxsparse.compile(flat, Plan(sparsity=0.8))


class SharedKeys(nn.Module):
    """Attention of four query heads that share two heads of keys and values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(16, n) for n in (16, 8, 8, 16))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


def test_attention_with_shared_keys_trains_sparse_and_shrinks_rightly():
    x = torch.randn(2, 5, 16)
    model = fxsparse.prune(SharedKeys().eval(), Plan(sparsity=0.5))
    with torch.no_grad():
        model.v.weight[2] = model.v.bias[2] = model.k.weight[3] = model.q.weight[3] = 0
    fast = fxsparse.compile(model, mode="infer", example_inputs=(x,))
    torch.testing.assert_close(fast(x), model(x))
    sparse = fxsparse.compile(SharedKeys(), Plan(sparsity=0.5, method=RIGL), example_inputs=(x,))
    assert set(sparse.masks()) == {"q.weight", "k.weight", "v.weight", "o.weight"}


def test_nothing_stands_on_what_torch_retires():
    retired = ("torch.ao", "torchao", "torch.jit", "torch.fx.experimental.optimization")
    found = {f"{path}: {name}" for path in sources() for name in imports(path) if name.startswith(retired)}
    assert found == set()


def test_no_source_hides_from_a_compiler():
    hiding = re.compile(r"compiler\.disable|_dynamo\.disable|allow_in_graph|suppress_errors")
    assert [str(path) for path in sources() if hiding.search(path.read_text())] == []


def test_what_is_imported_is_declared_and_what_is_declared_is_few_and_unpinned():
    required, extras = DECLARED["dependencies"], DECLARED["optional-dependencies"]
    optional = names(entry for group in extras.values() for entry in group)
    own = {"fxsparse", "triton"}  # torch brings triton where there is one
    found = {name.partition(".")[0] for path in sources() for name in imports(path)}
    foreign = {NAMED_OTHERWISE.get(name, name) for name in found - set(sys.stdlib_module_names) - own}
    assert foreign <= names(required) | optional
    assert len(required) <= 10
    assert not names(required) & {"pytest", "ruff", "notebook", "hypothesis", "torchvision", "transformers"}
    assert [entry for entry in required if "<" in entry or "==" in entry] == []

"""SparseModule keeps the user's names, objects and habits."""

import copy
import io
import pickle

import pytest
import torch
import torchvision
from torch import nn

import fxsparse
from fxsparse import Override, Plan
from fxsparse.errors import CheckpointError, PlanError, TraceError
from fxsparse.methods import rigl, set_, static
from fxsparse.pattern import ConstantFanIn

STORAGES = ("masked", "compact")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 16, 32)
        self.head = nn.Linear(32, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).flatten(1)
        return self.head(torch.relu(self.fc(self.drop(x))))


def model():
    torch.manual_seed(0)
    return Net()


def compiled(storage="masked", **changes):
    plan = Plan(
        **{"sparsity": 0.8, "storage": storage, "method": rigl(every=2, stop=50, variant="torch"), **changes}
    )
    return fxsparse.compile(model(), plan, example_inputs=(torch.randn(2, 3, 4, 4),))


def train(sparse, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        torch.manual_seed(step)
        optimizer.zero_grad()
        sparse(torch.randn(6, 3, 4, 4, generator=generator)).square().sum().backward()
        optimizer.step()


def test_masked_storage_shares_parameters_and_keeps_keys_order_and_identity():
    user = model()
    before = {name: id(parameter) for name, parameter in user.named_parameters()}
    keys = list(user.state_dict())
    sparse = fxsparse.compile(user, Plan(sparsity=0.8, storage="masked"))
    assert {name: id(parameter) for name, parameter in sparse.named_parameters()} == before
    own = [
        key for key in sparse.state_dict() if not key.endswith("_mask") and not key.startswith("fxsparse_")
    ]
    assert own == keys
    assert list(sparse.dense_state_dict()) == keys
    assert list(user.state_dict()) == keys
    assert (user.fc.weight == 0).float().mean() > 0.5


def test_compact_storage_leaves_the_model_untouched_and_names_values_and_indices():
    user = model()
    before = {name: value.clone() for name, value in user.state_dict().items()}
    sparse = fxsparse.compile(user, Plan(sparsity=0.8, storage="compact", exclude=("conv",)))
    train(sparse, torch.optim.SGD(sparse.parameters(), lr=0.1), 1)
    keys = sparse.state_dict().keys()
    assert {"fc.weight.values", "fc.weight.indices"} <= keys
    assert "fc.weight" not in keys
    for name in ("fc.weight", "head.weight"):
        assert torch.equal(user.state_dict()[name], before[name])


def test_batch_norm_and_dropout_follow_train_and_eval_in_both_directions():
    sparse, x = compiled(), torch.randn(6, 3, 4, 4)
    sparse.eval()
    assert torch.equal(sparse(x), sparse(x))
    mean = sparse.bn.running_mean.clone()
    sparse.train()
    assert not torch.equal(sparse(x), sparse(x))
    assert not torch.equal(sparse.bn.running_mean, mean)
    mean = sparse.bn.running_mean.clone()
    sparse.eval()(x)
    assert torch.equal(sparse.bn.running_mean, mean)


@pytest.mark.parametrize("storage", STORAGES)
def test_any_batch_size_runs(storage):
    sparse = compiled(storage)
    for size in (1, 2, 7):
        assert (
            sparse(torch.randn(size, 3, 4, 4)[: max(size, 1)] if size > 1 else torch.randn(2, 3, 4, 4)).shape[
                1
            ]
            == 5
        )
    assert sparse.eval()(torch.randn(1, 3, 4, 4)).shape == (1, 5)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_after_backward_is_equal_independent_and_goes_on_alike(again, storage):
    sparse = compiled(storage)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer)
    train(sparse, optimizer, 3)
    twin = again(sparse)
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    train(sparse, optimizer, 3, first=3)
    for name, value in before.items():
        assert torch.equal(value, twin.state_dict()[name]), name
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    twin.attach(optimizer)
    train(twin, optimizer, 3, first=3)
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


@pytest.mark.parametrize("storage", STORAGES)
def test_dense_checkpoints_load_in_both_directions_strict(storage):
    sparse, dense = compiled(storage), model()
    masks = sparse.masks()
    with torch.no_grad():
        dense.fc.weight.fill_(3.0)
    sparse.load_state_dict(dense.state_dict(), strict=True)
    found = sparse.dense_state_dict()
    assert torch.equal(found["fc.weight"], 3.0 * masks["fc.weight"])
    model().load_state_dict(found, strict=True)
    buffer = io.BytesIO()
    torch.save(sparse.state_dict(), buffer)
    buffer.seek(0)
    other = compiled(storage, seed=5)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(other.masks()["fc.weight"], masks["fc.weight"])
    assert torch.equal(other.eval()(torch.ones(2, 3, 4, 4)), sparse.eval()(torch.ones(2, 3, 4, 4)))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_dense_state_dict_of_a_module_under_two_names_loads(storage):
    def make():
        linear = nn.Linear(16, 16)
        return nn.Sequential(linear, nn.ReLU(), linear)

    sparse = fxsparse.compile(make(), Plan(sparsity=0.5, method=static(), storage=storage))
    masks, dense = sparse.masks(), make()
    sparse.load_state_dict(dense.state_dict(), strict=True)
    assert torch.equal(sparse.to_dense()[0].weight, dense[0].weight * masks["0.weight"])
    sparse.load_state_dict(sparse.dense_state_dict(), strict=True)


class AsksForItsVersion:
    """As torchvision's MNASNet, it loads nothing that does not say which version wrote it."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError(f"version should be 2 instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Versioned(AsksForItsVersion, nn.Linear):
    pass


class VersionedRoot(AsksForItsVersion, nn.Sequential):
    pass


@pytest.mark.parametrize("storage", STORAGES)
def test_modules_that_ask_for_their_version_when_loading(storage, tmp_path):
    model = VersionedRoot(Versioned(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    sparse = fxsparse.compile(model, Plan(sparsity=0.5, method=static(), storage=storage))
    dense = sparse.to_dense()
    dense.load_state_dict(sparse.dense_state_dict())
    sparse.load_state_dict(dense.state_dict())
    sparse.load_state_dict(sparse.state_dict())
    x = torch.randn(3, 8)
    torch.testing.assert_close(sparse.eval()(x), dense.eval()(x))
    fast = fxsparse.compile(sparse, mode="infer")
    torch.testing.assert_close(fast(x), dense(x))
    for compiled in (sparse, fast):
        fxsparse.save(compiled, tmp_path / "file")
        for other in (fxsparse.load(tmp_path / "file", dense), pickle.loads(pickle.dumps(compiled))):
            assert torch.equal(other(x), compiled(x))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_state_dict_loads_under_a_wrapper_s_prefix(storage):
    wrapped = nn.ModuleDict({"module": compiled(storage)})
    wrapped.load_state_dict(
        {f"module.{key}": value for key, value in model().state_dict().items()}, strict=True
    )
    assert torch.equal(wrapped["module"].get_parameter("head.bias"), model().head.bias)
    other = compiled(storage, seed=3, method=static("random"))
    wrapped = nn.ModuleDict({"module": compiled(storage, method=static("random"))})
    wrapped.load_state_dict(nn.ModuleDict({"module": other}).state_dict(), strict=True)
    assert torch.equal(wrapped["module"].masks()["fc.weight"], other.masks()["fc.weight"])


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_only_keys_of_another_storage_bring_advice_about_storages(storage):
    sparse = compiled(storage)
    state = {name: value for name, value in sparse.state_dict().items() if name != "head.bias"}
    with pytest.raises(CheckpointError, match=r"does not fit the model\. (?s:.*)head\.bias"):
        sparse.load_state_dict(state)
    other = compiled("compact" if storage == "masked" else "masked")
    with pytest.raises(CheckpointError, match=r"does not fit the model \(between masked and compact"):
        sparse.load_state_dict(other.state_dict())


def test_a_foreign_state_dict_is_a_checkpoint_error():
    with pytest.raises(CheckpointError, match=r"(?s)does not fit the model.*fc\.weight"):
        compiled().load_state_dict({"other": torch.ones(1)})
    wrong = model().state_dict()
    wrong["fc.weight"] = torch.ones(3, 3)
    for storage in STORAGES:
        with pytest.raises(CheckpointError, match=r"(?s)fc\.weight"):
            compiled(storage).load_state_dict(wrong)


def test_a_state_dict_of_the_other_storage_names_the_one_that_loads():
    masked, compact = compiled("masked"), compiled("compact")
    for target, source in ((masked, compact), (compact, masked)):
        with pytest.raises(CheckpointError, match=r"load the dense_state_dict\(\) of the other one"):
            target.load_state_dict(source.state_dict())
        target.load_state_dict(source.dense_state_dict())


@pytest.mark.parametrize("storage", STORAGES)
def test_to_dense_is_the_user_s_class_and_computes_the_same(storage):
    sparse, x = compiled(storage), torch.randn(3, 3, 4, 4)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer)
    train(sparse, optimizer, 3)
    dense = sparse.eval().to_dense()
    assert type(dense) is Net
    torch.testing.assert_close(dense(x), sparse(x))
    dense.fc.weight.data.fill_(1)
    assert not torch.equal(sparse.dense_state_dict()["fc.weight"], dense.fc.weight)


def test_to_moves_masks_and_indices_and_converts_the_dtype():
    for storage in STORAGES:
        sparse = compiled(storage).to(torch.float64)
        assert sparse.eval()(torch.randn(2, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64
        assert sparse.masks()["fc.weight"].dtype == torch.bool
        assert str(sparse.to_dense().fc.weight.dtype) == "torch.float64"


def test_an_averaged_model_and_its_zeros():
    sparse = compiled()
    averaged = torch.optim.swa_utils.AveragedModel(sparse)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer)
    train(sparse, optimizer, 2)
    averaged.update_parameters(sparse)
    train(sparse, optimizer, 2, first=2)
    averaged.update_parameters(sparse)
    mask = sparse.masks()["fc.weight"]
    assert torch.equal(averaged.module.masks()["fc.weight"], mask)
    assert not averaged.module.dense_state_dict()["fc.weight"][~mask].any()
    assert averaged.eval()(torch.randn(2, 3, 4, 4)).shape == (2, 5)


def test_masks_coordinates_and_sparsity_agree():
    for storage in STORAGES:
        sparse = compiled(storage, pattern=ConstantFanIn())
        masks, found = sparse.masks(), sparse.sparsity()
        for name, (rows, cols) in sparse.coordinates().items():
            rebuilt = torch.zeros_like(masks[name]).flatten(1)
            rebuilt[rows, cols] = True
            assert torch.equal(rebuilt.reshape(masks[name].shape), masks[name])
            assert found[name] == pytest.approx(1 - masks[name].float().mean().item())
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        assert found["total"] == pytest.approx(zeros / sum(mask.numel() for mask in masks.values()))


def test_large_dense_copies_are_refused_with_a_way_out():
    sparse = compiled("compact")
    for call in (sparse.masks, sparse.dense_state_dict, sparse.to_dense):
        with pytest.raises(PlanError, match=r"more than max_bytes=10: pass names= of some weights"):
            call(max_bytes=10)
    assert list(sparse.masks(names=["head.weight"])) == ["head.weight"]
    assert list(sparse.dense_state_dict(names=["head.weight"])) == ["head.weight"]
    assert list(sparse.masks(names="head.weight")) == ["head.weight"]
    assert list(sparse.dense_state_dict(names="head.weight")) == ["head.weight"]
    partial = sparse.to_dense(names=["head.weight"])
    assert partial.fc.weight.is_meta
    assert not partial.head.weight.is_meta
    with pytest.raises(PlanError, match=r"no sparse weight 'nothing'"):
        sparse.masks(names=["nothing"])


def test_every_parameter_is_in_layers_or_untouched_exactly_once():
    sparse = compiled(exclude=("head",), overrides=(Override("conv", sparsity=0.5),))
    report = sparse.report.to_dict()
    named = [row["name"] for row in report["layers"] + report["untouched"]]
    assert sorted(named) == sorted(name for name, _ in model().named_parameters())
    rows = {row["name"]: row for row in report["layers"]}
    assert rows["conv.weight"]["sparsity"] == pytest.approx(0.5)
    reasons = {row["name"]: row["reason"] for row in report["untouched"]}
    assert reasons["head.weight"] == "excluded by 'head'"
    assert all(reasons.values())


def test_forward_graph_is_of_the_current_mode_and_update_graph_has_a_node_per_weight():
    sparse = compiled()
    train_graph = sparse.forward_graph
    assert sparse.eval().forward_graph is not train_graph or "dropout" not in train_graph.code
    calls = [node for node in sparse.update_graph.graph.nodes if node.op == "call_function"]
    assert [node.args[-1] for node in calls] == ["conv.weight", "fc.weight", "head.weight"]
    assert all("update_mask" in str(node.target) for node in calls)


def test_a_tied_weight_has_one_mask_for_both_users():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    tied, x = Tied(), torch.randn(3, 8)
    sparse = fxsparse.compile(tied, Plan(sparsity=0.5, method=set_(every=1)))
    effective = tied.a.weight.detach() * sparse.masks()["a.weight"]
    expected = torch.relu(x @ effective.t()) @ effective.t()
    torch.testing.assert_close(sparse(x), expected)
    with torch.no_grad():
        tied.a.weight.fill_(1.0)  # behind the mask's back: both users still see it
    effective = sparse.masks()["a.weight"].float()
    torch.testing.assert_close(sparse(x), torch.relu(x @ effective.t()) @ effective.t())


def test_the_walk_tier_trains_behind_masks_and_has_no_forward_graph():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.fc(x) if float(x.detach().sum()) > 0 else -self.fc(x))

    sparse = fxsparse.compile(
        Untraceable(), Plan(sparsity=0.5, method=rigl(every=2, stop=9)), example_inputs=(torch.randn(2, 8),)
    )
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    before = sparse.masks()
    for _ in range(5):
        optimizer.zero_grad()
        sparse(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    masks = sparse.masks()
    assert any(not torch.equal(before[name], mask) for name, mask in masks.items())
    assert not sparse.get_parameter("fc.weight")[~masks["fc.weight"]].any()
    twin = copy.deepcopy(sparse)
    assert torch.equal(twin(torch.ones(2, 8)), sparse(torch.ones(2, 8)))
    with pytest.raises(TraceError, match="module-walk tier has no forward graph"):
        _ = sparse.forward_graph


def test_packed_attention_projections_are_sparse():
    vit = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=3)
    sparse = fxsparse.compile(
        vit, Plan(sparsity=0.9, storage="masked"), example_inputs=(torch.randn(2, 3, 16, 16),)
    )
    name = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    assert name in sparse.masks()
    with torch.no_grad():
        vit.heads.head.weight.normal_()  # torchvision starts it at 0, and with it every gradient below
    sparse(torch.randn(2, 3, 16, 16)).sum().backward()
    gradient = sparse.get_parameter(name).grad
    assert not gradient[~sparse.masks()[name]].any()
    assert gradient.any()


def test_the_walk_leaves_alone_what_it_cannot_swap():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaled, self.attention, self.fc = Scaled(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

        def forward(self, x):
            x = self.scaled(x) if float(x.detach().sum()) > 0 else self.fc(x)
            return self.fc(self.attention(x, x, x)[0])

    model, x = Untraceable(), torch.ones(3, 1, 8)
    sparse = fxsparse.compile(model, Plan(sparsity=0, allocation="uniform"), example_inputs=x)
    torch.testing.assert_close(sparse(x), model(x))
    assert sparse.masks().keys() == {"fc.weight"}
    reasons = {row["name"]: row["reason"] for row in sparse.report.to_dict()["untouched"]}
    for name in ("scaled.weight", "attention.in_proj_weight", "attention.out_proj.weight"):
        assert "module walk" in reasons[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sparsity": 0.6},
            r"conv.weight_mask: expected \d+ active entries, as this plan has after 0 steps, got",
        ),
        ({"pattern": ConstantFanIn()}, r"active entries|does not fit ConstantFanIn"),
    ],
    ids=["sparsity", "pattern"],
)
def test_masks_of_another_plan_are_a_checkpoint_error(change, message):
    with pytest.raises(CheckpointError, match=message):
        compiled(**change).load_state_dict(compiled().state_dict())


def test_impossible_masks_and_steps_are_checkpoint_errors():
    for name, value, message in [
        ("fc.weight_mask", torch.ones(32, 128, dtype=torch.bool), "active entries"),
        ("fc.weight_mask", torch.ones(32, 128), "expected bool, got torch.float32"),
        ("fxsparse_step", torch.tensor(-5), "expected a count of optimizer steps, got -5"),
    ]:
        state = compiled().state_dict() | {name: value}
        with pytest.raises(CheckpointError, match=message):
            compiled().load_state_dict(state)
    compact = compiled("compact")
    state = compact.state_dict()
    state["fc.weight.indices"] = state["fc.weight.indices"] + 0.5
    with pytest.raises(CheckpointError, match=r"fc.weight.indices: expected int32, got torch.float32"):
        compact.load_state_dict(state)


@pytest.mark.parametrize("storage", STORAGES)
def test_to_dense_after_loading_by_assignment(storage):
    sparse, x = compiled(storage).eval(), torch.randn(2, 3, 4, 4)
    torch.manual_seed(9)
    sparse.load_state_dict(Net().state_dict(), assign=True)
    torch.testing.assert_close(sparse.to_dense()(x), sparse(x))


def test_inference_refuses_an_input_gradient_instead_of_losing_it():
    dense = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).eval()
    pruned, x = fxsparse.prune(dense, Plan(sparsity=0.98)), torch.randn(2, 512)
    fast = fxsparse.compile(pruned, mode="infer", example_inputs=x)
    assert "PackedWeight" in str(fast)  # whichever sparse kernel measured fastest
    with pytest.raises(fxsparse.FxSparseError, match="requires a gradient: expected none"):
        fast(x.requires_grad_())


def test_names_that_are_no_identifiers_or_taken():
    hooked = nn.Sequential(nn.Linear(8, 8))
    hooked[0].register_forward_hook(lambda module, inputs, output: None)
    x = torch.randn(2, 8)
    torch.testing.assert_close(fxsparse.compile(hooked, Plan(sparsity=0), example_inputs=x)(x), hooked(x))
    with pytest.raises(TraceError, match="'graph' has the name of an attribute"):
        fxsparse.compile(nn.ModuleDict({"graph": nn.Linear(2, 2)}), Plan(sparsity=0.5))


def test_half_precision_trains_compact_in_plain_pytorch():
    model = nn.Linear(16, 16).half()
    sparse = fxsparse.compile(model, Plan(sparsity=0.5, storage="compact"))
    y = sparse(torch.randn(3, 16).half())
    y.sum().backward()
    assert y.dtype == sparse.get_parameter("weight.values").grad.dtype == torch.float16

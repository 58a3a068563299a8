"""``fxsparse.prune`` from calibration batches, whole."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Override, Plan, Report
from fxsparse.demo.models import ViT
from fxsparse.errors import NumericsError, PatternError, PlanError
from fxsparse.methods import sparsegpt, static, wanda
from fxsparse.pattern import NM, Block, ConstantFanIn, Unstructured

METHODS = {"magnitude": static("magnitude"), "wanda": wanda(), "sparsegpt": sparsegpt()}


def batches(*shape, count=2):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draw) for _ in range(count)]


def layers(model, plan, calibration):
    """The pruned model, and {weight: its row in the report}."""
    report = Report()
    pruned = fxsparse.prune(model, plan, calibration=calibration, report=report)
    return pruned, {row["name"]: row for row in report.layers}


def wanda_by_hand(model, blocks, inputs, sparsity):
    """Block by block on a copy: hooks, scores, the smallest of each row out, then the next block."""
    model = copy.deepcopy(model).eval()
    for block in blocks:
        squares = dict.fromkeys(block, 0.0)
        for name in block:

            def add(module, args, name=name, squares=squares):
                squares[name] = squares[name] + args[0].flatten(0, -2).double().square().sum(0)

            model.get_submodule(name).register_forward_pre_hook(add)
        with torch.no_grad():
            for x in inputs:
                model(x)
            for name in block:
                weight = model.get_submodule(name).weight
                score = weight.abs() * squares[name].sqrt().float()
                out = score.argsort(1)[:, : int(weight.shape[1] * sparsity)]
                weight.scatter_(1, out, 0.0)
                model.get_submodule(name)._forward_pre_hooks.clear()
    return model


BLOCKS = [["embed"]] + [
    [f"blocks.{k}.{name}" for name in pair]
    for k in range(2)
    for pair in (("attention.qkv", "attention.out"), ("mlp.0", "mlp.2"))
]


class Opaque(ViT):
    """A ViT that no front end captures."""

    def forward(self, x):
        return super().forward(x if float(x.detach().sum()) > -1e9 else -x)


@pytest.mark.parametrize("kind", [ViT, Opaque])
def test_wanda_is_what_one_gets_by_hand_with_and_without_a_graph(kind):
    torch.manual_seed(0)
    model, calibration = kind(16, 2), batches(4, 1, 8, 8)
    plan = Plan(sparsity=0.5, method=wanda(), exclude=("head",))
    pruned, rows = layers(model, plan, iter(calibration))
    blocks = BLOCKS if kind is ViT else [BLOCKS[0], BLOCKS[1] + BLOCKS[2], BLOCKS[3] + BLOCKS[4]]
    by_hand = wanda_by_hand(model, blocks, calibration, 0.5)
    assert all(torch.equal(p, q) for p, q in zip(pruned.parameters(), by_hand.parameters(), strict=True))
    assert type(pruned) is kind
    assert pruned.training
    assert all(0 < row["output_error"] < 1 for row in rows.values())


@pytest.mark.parametrize(
    "pattern", [Unstructured(), NM(2, 4), Block(2, 2), ConstantFanIn()], ids=lambda p: type(p).__name__
)
def test_counts_are_exact_and_sparsegpt_loses_least(pattern):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    mixing = torch.randn(16, 16) * torch.logspace(0, -2, 16)[:, None]
    calibration = [x @ mixing for x in batches(64, 16)]
    plans = {
        k: Plan(sparsity=0.5, pattern=pattern, allocation="uniform", method=m) for k, m in METHODS.items()
    }
    errors = {}
    for name, plan in plans.items():
        before = copy.deepcopy(model.state_dict())
        pruned, rows = layers(model, plan, calibration)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        counts = fxsparse.allocate(model, plan)
        for weight, nnz in counts.items():
            mask = pruned.get_parameter(weight) != 0
            pattern.check(mask)
            assert int(mask.sum()) == nnz == rows[weight]["nnz"]
        errors[name] = sum(row["output_error"] for row in rows.values())
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_the_error_of_an_output_is_what_it_says():
    layer, [x] = nn.Linear(8, 4), batches(16, 8, count=1)
    pruned, rows = layers(layer, Plan(sparsity=0.5, method=sparsegpt()), [x])
    with torch.no_grad():
        whole, lost = layer(x) - layer.bias, layer(x) - pruned(x)
    assert rows["weight"]["output_error"] == pytest.approx(float(lost.norm() / whole.norm()))
    report = Report()
    fxsparse.prune(layer, Plan(sparsity=0.5, method=sparsegpt()), calibration=[x], report=report)
    assert "error of output" in str(report)
    assert report.notes[-1] == "calibration batches: 1; blocks pruned one after the other: 1"


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding="same"),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.BatchNorm2d(8),
        )
        self.depthwise, self.up = nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.body(x)
        x = self.up(self.depthwise(x).relu_())
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_convolutions_with_groups_and_a_transposed_one_by_magnitude_with_a_warning(method):
    torch.manual_seed(0)
    model = Convolutions()
    plan = Plan(sparsity=0.5, method=METHODS[method])
    with pytest.warns(
        UserWarning,
        match=r"pruned by magnitude, wholly or in part, in place of \w+: up.weight \(conv_transpose2d adds",
    ):
        pruned, rows = layers(model, plan, batches(4, 2, 8, 8))
    assert rows["up.weight"]["reason"].startswith("by magnitude: conv_transpose2d adds up")
    assert "output_error" not in rows["up.weight"]
    for name, nnz in fxsparse.allocate(model, plan).items():
        assert int((pruned.get_parameter(name) != 0).sum()) == nnz
    by_groups = (pruned.depthwise.weight != 0).flatten(1).sum(1)
    assert int(by_groups.max() - by_groups.min()) <= 1  # 36 of 72 entries in 8 groups: 4 or 5 each
    assert torch.equal(pruned.body[3].running_mean, model.body[3].running_mean)
    assert rows["depthwise.weight"]["output_error"] < 1


class Experts(nn.Module):
    """The last expert sees no token."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        choice = (x[:, 0] > 0).long()
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (choice == k).nonzero().squeeze(1)
            if len(rows):
                y[rows] = expert(x[rows])
        return y


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_expert_without_tokens_is_pruned_by_magnitude_and_said_to_be(method):
    model = Experts()
    plan = Plan(sparsity=0.5, pattern=NM(2, 4), method=METHODS[method])
    with pytest.warns(UserWarning, match=r"experts.2.weight \(saw no input on the calibration") as seen:
        pruned, rows = layers(model, plan, batches(16, 8))
    assert seen[0].filename == __file__
    assert rows["experts.2.weight"]["reason"] == "by magnitude: saw no input on the calibration batches"
    by_magnitude = fxsparse.prune(model, Plan(pattern=NM(2, 4)))
    assert torch.equal(pruned.experts[2].weight, by_magnitude.experts[2].weight)
    assert not torch.equal(pruned.experts[1].weight, by_magnitude.experts[1].weight)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_kept_dense_stays_as_it_is(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    plan = Plan(sparsity=0.5, method=METHODS[method], overrides=(Override("2", sparsity=0),))
    pruned = fxsparse.prune(model, plan, calibration=batches(16, 8))
    assert torch.equal(pruned[2].weight, model[2].weight)
    assert int((pruned[0].weight != 0).sum()) == 32


def test_pruned_weights_train_on_with_their_zeros():
    model, calibration = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), batches(16, 8)
    pruned = fxsparse.prune(model, Plan(sparsity=0.5, method=sparsegpt()), calibration=calibration)
    zeros = {name: p == 0 for name, p in pruned.named_parameters() if p.dim() > 1}
    sparse = fxsparse.compile(pruned, Plan(sparsity=0.5, method=static("magnitude"), allocation="uniform"))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse(calibration[0]).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(sparse.get_parameter(name) == 0, mask) for name, mask in zeros.items())
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=calibration[0])
    torch.testing.assert_close(fast(calibration[0]), sparse.eval()(calibration[0]))


@pytest.mark.parametrize(("method", "cache"), [("sparsegpt", False), ("wanda", True)])
def test_gpt2_with_a_graph_and_without_one(method, cache):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1,
        n_embd=16,
        n_head=2,
        vocab_size=50,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=cache,
    )
    model = transformers.GPT2LMHeadModel(config)  # a cache of keys keeps torch.export from capturing it
    ids = [
        {"input_ids": torch.randint(50, (n, 8), generator=torch.Generator().manual_seed(n))} for n in (2, 3)
    ]
    plan = Plan(pattern=NM(2, 4), method=METHODS[method])
    pruned, rows = layers(model, plan, ids)
    assert len(rows) == 4
    for name, row in rows.items():
        NM(2, 4).check(pruned.get_parameter(name).t() != 0)  # stored [in, out]
        assert int((pruned.get_parameter(name) != 0).sum()) == row["nnz"] == row["numel"] // 2
        assert 0 < row["output_error"] < 0.7
    assert torch.equal(pruned.transformer.wte.weight, model.transformer.wte.weight)
    assert pruned.lm_head.weight is pruned.transformer.wte.weight


def test_llama_keeps_its_norms():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=50, max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model, ids = transformers.LlamaForCausalLM(config), torch.randint(50, (4, 8))
    plan = Plan(sparsity=0.5, method=sparsegpt(), exclude=("lm_head",))
    pruned, rows = layers(model, plan, [{"input_ids": ids}])
    assert len(rows) == 7
    assert all(int((pruned.get_parameter(n) != 0).sum()) == r["nnz"] for n, r in rows.items())
    assert torch.equal(pruned.model.norm.weight, model.model.norm.weight)
    assert pruned.eval()(input_ids=ids).logits.isfinite().all()


def linear():
    return nn.Sequential(nn.Linear(6, 4))


BAD = {
    "a score of a loss": (
        linear,
        static("snip"),
        None,
        PlanError,
        r"weight alone, .* got 'snip'.*initial_scores=",
    ),
    "no calibration": (
        linear,
        wanda(),
        None,
        PlanError,
        r"wanda looks at what layers read: expected calibration=",
    ),
    "a tensor": (
        linear,
        wanda(),
        torch.randn(2, 6),
        PlanError,
        r"an iterable of batches, got Tensor.* is \[x\]",
    ),
    "a dict": (linear, wanda(), {"x": torch.randn(2, 6)}, PlanError, "an iterable of batches, got dict"),
    "a number": (linear, wanda(), 128, PlanError, "an iterable of batches, got int"),
    "none at all": (linear, wanda(), iter(()), PlanError, "at least one calibration batch, got none"),
    "with labels": (
        lambda: nn.Linear(6, 4),
        wanda(),
        [(torch.randn(2, 6), torch.zeros(2))],
        PlanError,
        r"batch 0 is not what the model is called with: .*pass \(inputs for inputs, _ in loader\)",
    ),
    "a number as a batch": (
        linear,
        wanda(),
        [torch.randn(2, 6), 3],
        PlanError,
        "batch 1 is not what the model",
    ),
    "another width": (
        linear,
        sparsegpt(),
        [torch.randn(2, 6), torch.randn(2, 7)],
        PlanError,
        "it fails on batch 1: RuntimeError",
    ),
    "NaN": (
        linear,
        sparsegpt(),
        [torch.full((2, 6), torch.nan)],
        NumericsError,
        r"^weight '0.weight': expected finite inputs on the calibration batches",
    ),
    "on meta": (
        lambda: nn.Linear(6, 4, device="meta"),
        wanda(),
        [torch.randn(2, 6)],
        PlanError,
        "'weight' is on the meta device and has no values to prune",
    ),
}


@pytest.mark.parametrize(("model", "method", "calibration", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_get_a_named_error(model, method, calibration, error, message):
    with pytest.raises(error, match=message):
        fxsparse.prune(model(), Plan(sparsity=0.5, method=method), calibration=calibration)


def test_a_compiled_model_is_refused():
    sparse = fxsparse.compile(linear(), Plan(sparsity=0.5))
    with pytest.raises(PlanError, match=r"prune: this model is compiled already; use model.to_dense\(\)"):
        fxsparse.prune(sparse, Plan(sparsity=0.5, method=wanda()), calibration=batches(2, 6))


class WritesToItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x += 1
        return self.two(self.one(x).relu_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_batches_stay_as_they_are_and_half_precision_models_keep_their_dtype(dtype):
    model, [x] = WritesToItsInput().to(dtype), [b.to(dtype) for b in batches(16, 6, count=1)]
    before = x.clone()
    pruned, rows = layers(model, Plan(sparsity=0.5, method=sparsegpt()), [x])
    assert torch.equal(x, before)
    assert pruned.one.weight.dtype == dtype
    assert [int((pruned.get_parameter(n) != 0).sum()) for n in rows] == [18, 18]


def test_methods_that_do_not_train_refuse_to():
    with pytest.raises(
        PlanError, match=r"sparsegpt prunes a trained model without training: call fxsparse.prune"
    ):
        fxsparse.compile(linear(), Plan(sparsity=0.5, method=sparsegpt()))
    assert fxsparse.allocate(linear(), Plan.preset("wanda-50")) == {"0.weight": 12}


def test_a_weight_that_is_not_finite_and_a_used_report_are_refused():
    model, plan = linear(), Plan(sparsity=0.5, method=wanda())
    with pytest.raises(PlanError, match="report as an empty"):
        fxsparse.prune(model, plan, calibration=batches(2, 6), report=fxsparse.plan_report(model, plan))
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"weight '0.weight': expected scores without NaN"):
        fxsparse.prune(model, plan, calibration=batches(2, 6))


def test_blocks_of_rows_that_groups_cut_are_refused():
    model = nn.Conv2d(4, 4, 1, groups=4)
    plan = Plan(sparsity=0.5, method=wanda(), pattern=Block(2, 1))
    with pytest.raises(
        PatternError, match=r"weight 'weight': out_features=1; Block\(2, 1\) needs a multiple of 2"
    ):
        fxsparse.prune(model, plan, calibration=batches(2, 4, 3, 3))


def test_buffers_generators_and_gradients_are_left_alone():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model(torch.randn(4, 6)).sum().backward()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = fxsparse.prune(model, Plan(sparsity=0.5, method=wanda()), calibration=batches(4, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(pruned[2].running_var, model[2].running_var)
    assert [m.training for m in pruned.modules()] == [m.training for m in model.modules()]

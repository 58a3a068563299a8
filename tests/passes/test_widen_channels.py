from operator import mul

import pytest
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn

from benchmarks.models import ResNet56
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.transformation import transform
from fxsparse.transforms import SparseDoped, SparseFactorized, SparseParallel, SparseWide


def wide(model, x, sparsity=0.75, heads="fixed"):
    return transform(model, Plan(transform=SparseWide(heads=heads), sparsity=sparsity), x)


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def dense(model):
    return {name: why.partition(": ")[2] for name, why in model.origin.dense.items()}


def runs(model, *args, **kwargs):
    """The first output of a forward in training, whose backward reaches every parameter."""
    out = model.train()(*args, **kwargs)
    out = out if isinstance(out, torch.Tensor) else out.logits
    out.float().square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    return out


class Wiring(nn.Module):
    """Adds, concatenates, normalises in three ways, shuffles pixels, groups and flattens."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 32, 1)
        self.batch, self.group = nn.BatchNorm2d(8), nn.GroupNorm(4, 16)
        self.depthwise, self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1, groups=2)
        self.shuffle, self.layer = nn.PixelShuffle(2), nn.LayerNorm(8)
        self.fc, self.head = nn.Linear(8 * 4, 24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.grouped(self.depthwise(self.batch(self.a(x))))
        x = self.shuffle(self.b(self.group(torch.cat((x, x), 1))))
        x = self.layer(nn.functional.adaptive_avg_pool2d(x, 2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(torch.relu(self.fc(x.flatten(1))))


def test_everything_that_is_tied_grows_together():
    model = wide(Wiring(), torch.randn(2, 3, 8, 8))
    found = shapes(model)
    assert found["stem.weight"] == (16, 3, 3, 3)
    assert found["a.weight"] == (16, 16, 1, 1)
    assert found["b.weight"] == (64, 32, 1, 1)
    assert found["depthwise.weight"] == (16, 1, 3, 3)
    assert found["grouped.weight"] == (16, 4, 1, 1)  # groups of the same width, and four of them
    assert (found["batch.weight"], found["group.weight"], found["layer.weight"]) == ((16,), (32,), (16,))
    assert (found["fc.weight"], found["head.weight"]) == ((48, 64), (5, 48))
    assert model.get_buffer("batch.running_var").shape == (16,)
    assert dense(model)["depthwise.weight"] == "depthwise convolution"
    assert runs(model, torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_multiples_of_the_first_width_stay_so_and_others_are_rounded_down():
    model = nn.Sequential(nn.Linear(3, 10), nn.Linear(10, 90), nn.Linear(90, 7), nn.Linear(7, 2))
    found = shapes(wide(model, torch.randn(2, 3), 0.5))
    assert [found[f"{k}.weight"][0] for k in range(4)] == [14, 126, 9, 2]  # 10 k is 14.1, 90 k 127.3, 7 k 9.9


def test_the_groups_of_a_group_norm_stay_as_many():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1))
    found = shapes(wide(model, torch.randn(2, 3, 4, 4), 0.5))
    assert found["1.weight"] == (9,)  # 6 k is 8.5: 8, and 9 is the next multiple of 3


def test_pieces_of_one_size_stay_so():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.both = nn.Linear(3, 4), nn.Linear(4, 6)
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            a, b = self.both(self.stem(x)).chunk(2, -1)[0], self.both(self.stem(x)).split(3, -1)[1]
            return self.head(self.a(a) + self.b(b))

    found = shapes(wide(Halves(), torch.randn(2, 3), 0.6))
    assert found["both.weight"] == (10, 6)  # 6 k is 9.5: 9, which has no halves
    assert found["a.weight"] == found["b.weight"] == (6, 5)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 24), nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.up, self.down, self.head = nn.Linear(24, 96), nn.Linear(96, 24), nn.Linear(24, 9)

    def forward(self, tokens):
        x = self.embed(tokens)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize(
    # 24 k is 33.9, and a multiple of 4 heads is 36; heads of 6 allow 36 too.
    ("heads", "inner"),
    [("fixed", 36), ("grow", 36)],
)
def test_widths_are_rounded_up_to_whole_heads(heads, inner):
    tokens = torch.zeros(2, 5, dtype=torch.long)
    model = wide(Attention(), tokens, 0.5, heads)
    found = shapes(model)
    assert found["embed.weight"] == (9, inner)
    assert found["attention.in_proj_weight"] == (3 * inner, inner)
    assert found["attention.in_proj_bias"] == (3 * inner,)
    assert found["up.weight"] == (4 * inner, inner)
    assert found["head.weight"] == (9, inner)
    cuts = [list(node.args[2]) for node in model.graphs["eval"].nodes if node.target == "unflatten"]
    assert cuts == [[4 if heads == "fixed" else 6, -1]] * 3
    assert runs(model, tokens).shape == (2, 5, 9)


def test_outputs_that_show_the_hidden_state_keep_its_width():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 32), nn.Linear(32, 8), nn.LayerNorm(8))
    found = shapes(wide(model, torch.randn(2, 4)))
    assert found["2.weight"] == (8, 64)
    with pytest.raises(
        PlanError, match=r"SparseWide: expected layers to transform, found none: 0.weight: .*input; 1"
    ):
        wide(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)), torch.randn(2, 4))
    plan = Plan(transform=SparseWide(), sparsity=0.5, exclude=("1",))
    with pytest.raises(
        PlanError, match=r"found none: .*; 1.weight: the plan excludes it\. It takes those between"
    ):
        transform(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), plan, torch.randn(2, 4))


def test_a_sparsity_too_small_to_widen_anything_is_refused_with_the_smallest_that_does():
    model = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 64), nn.Linear(64, 4))
    why = (
        r"1.weight: its widths stay: 32 times k = 1.00504 is rounded down to 32, .* that widens it is 0.0597"
    )
    with pytest.raises(PlanError, match=why):
        wide(model, torch.randn(2, 4), 0.01)
    assert shapes(wide(model, torch.randn(2, 4), 0.0597))["1.weight"] == (66, 33)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: torch.sort(x)[0],
        lambda x: F.batch_norm(x, torch.zeros(6), torch.ones(6)),
        lambda x: F.one_hot(x.argmax(1), 6).to(x.dtype),
        lambda x: torch.stack(x.unbind(1), 1),
        lambda x: F.pad(x, (5, -4))[:, :6],
    ],
)
def test_an_op_without_a_rule_keeps_its_width_with_the_reason(op):
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Linear(6, 6) for _ in range(5))

        def forward(self, x):
            return self.e(self.d(self.c(op(self.b(self.a(x))))))

    model = wide(Sorted(), torch.randn(2, 6))
    assert shapes(model)["b.weight"] == (6, 12)
    assert shapes(model)["c.weight"] == (12, 6)
    assert shapes(model)["d.weight"] == (12, 12)


class ByHand(nn.Module):
    """Attention as most write it, with sizes read from what goes in."""

    def __init__(self):
        super().__init__()
        self.embed, self.q, self.k, self.v = nn.Embedding(5, 16), *(nn.Linear(16, 16) for _ in range(3))
        self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def scores(self, q, k):
        return torch.einsum("bhqd, bhkd -> bhqk", q, k) * 0.5

    def forward(self, tokens):
        x = self.embed(tokens)
        batch, length, width = x.shape
        q, k, v = (f(x).view(batch, length, 4, width // 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = torch.einsum("bhqk,bhkd->bhqd", self.scores(q, k).softmax(-1), v)
        return self.head(self.out(out.transpose(1, 2).reshape(batch, length, width)))


@pytest.mark.parametrize("heads", ["fixed", "grow"])
def test_attention_by_einsum_grows_as_that_by_products(heads):
    class Products(ByHand):
        def scores(self, q, k):
            return torch.matmul(other=k.transpose(-2, -1), input=q) * 0.5

    tokens = torch.zeros(2, 3, dtype=torch.long)
    model = wide(ByHand(), tokens, heads=heads)
    assert shapes(model) == shapes(wide(Products(), tokens, heads=heads))
    assert shapes(model)["q.weight"] == (32, 32)
    [scale] = [node.args[1] for node in model.graphs["eval"].find_nodes(op="call_function", target=mul)]
    assert scale == pytest.approx(0.5 if heads == "grow" else 8**-0.5)
    assert runs(model, torch.zeros(4, 7, dtype=torch.long)).shape == (4, 7, 5)


def test_a_size_computed_from_a_width_that_grows_is_that_of_its_own_axis():
    class Sorted(ByHand):
        def scores(self, q, k):
            return torch.sort(q)[0] @ k.transpose(-2, -1)

    model = wide(Sorted(), torch.zeros(2, 3, dtype=torch.long))
    assert shapes(model)["q.weight"] == (16, 32)
    assert shapes(model)["v.weight"] == (32, 32)
    assert runs(model, torch.zeros(4, 7, dtype=torch.long)).shape == (4, 7, 5)


def test_code_whose_sizes_do_not_fit_any_more_is_refused_with_the_op_that_has_no_rule():
    class Adds(ByHand):
        def forward(self, tokens):
            x = self.embed(tokens)
            return self.head(torch.sort(self.q(x))[0] + torch.zeros(x.shape))

    with pytest.raises(
        PlanError, match=r"The size of|broadcast.* What these read keeps its width: sort \(sort\)"
    ):
        wide(Adds(), torch.zeros(2, 3, dtype=torch.long))


class Halves(nn.Module):
    def __init__(self, cut, gate):
        super().__init__()
        self.cut, self.gate = cut, gate
        self.first, self.up, self.back, self.head = (
            nn.Linear(*n) for n in ((3, 8), (8, 32), (16, 8), (8, 3))
        )

    def forward(self, x):
        y = self.up(self.first(x))
        halves = self.cut(y)
        return self.head(self.back(self.gate(y) if halves is None else halves[0] * halves[1]))


@pytest.mark.parametrize(
    ("cut", "gate"),
    [
        (lambda y: None, nn.GLU()),
        (lambda y: None, nn.functional.glu),
        (lambda y: y.chunk(2, -1), None),
        (lambda y: torch.split(y, 16, -1), None),
        (lambda y: torch.split(y, [16, 16], -1), None),
        (lambda y: torch.split(y, y.shape[-1] // 2, -1), None),
        (lambda y: torch.split(y, [y.shape[-1] // 2, y.shape[-1] // 2], -1), None),
        (lambda y: torch.tensor_split(y, 2, dim=-1), None),
    ],
)
def test_halves_grow_together(cut, gate):
    model = wide(Halves(cut, gate), torch.randn(2, 3))
    assert shapes(model)["up.weight"] == (64, 16)
    assert shapes(model)["back.weight"] == (16, 32)
    assert runs(model, torch.randn(5, 3)).shape == (5, 3)


def test_a_scale_of_the_width_of_heads_goes_with_it():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.q, self.k, self.v = nn.Embedding(5, 16), *(nn.Linear(16, 16) for _ in range(3))
            self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

        def forward(self, tokens):
            x = self.embed(tokens)
            q, k, v = (f(x).view(2, 3, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
            scores = (q * 0.5) @ k.transpose(-2, -1)
            out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 3, 16)
            return self.head(self.out(out))

    model = wide(Scores(), torch.zeros(2, 3, dtype=torch.long))
    scales = [
        node.args[1] for node in model.graphs["eval"].nodes if getattr(node.target, "__name__", "") == "mul"
    ]
    assert scales == [8**-0.5]
    assert runs(model, torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 5)


def test_entries_are_drawn_anew_and_buffers_repeated():
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
    )
    with torch.no_grad():
        model[1].running_mean.copy_(torch.arange(8.0))
        model[2].weight.copy_(torch.randint(1, 3, (8, 8)).float())
    made = wide(model, torch.randn(4, 4))
    assert made.get_buffer("1.running_mean").tolist() == [k // 2 for k in range(16)]
    assert sorted(set(made.get_parameter("2.weight").flatten().tolist())) == pytest.approx(
        [0.5**0.5, 2 * 0.5**0.5]
    )
    assert made.get_parameter("1.weight").tolist() == [1.0] * 16
    assert shapes(nn.Sequential(*model))["2.weight"] == (8, 8)  # what came is as it was


# -- published models --------------------------------------------------------------------------------------


def vgg11():
    with torch.device("meta"):  # where what is replaced draws no weights
        model = torchvision.models.vgg11(num_classes=7)
    for layer in model.features.to_empty(device="cpu"):
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier[0], model.classifier[3], model.classifier[6] = (
        nn.Linear(2048, 64),
        nn.Linear(64, 64),
        nn.Linear(64, 7),
    )
    return model


def densenet():
    return torchvision.models.DenseNet(
        growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16, num_classes=7
    )


def vit():
    return torchvision.models.VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=7)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_labels": 7,
}
IMAGE = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=7),
    "resnet56 with padded shortcuts": lambda: ResNet56(7),
    "vgg11": vgg11,
    "densenet": densenet,
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.5),
    "vit": vit,
}
TEXT = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=50, **SMALL)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=1, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=0
        )
    ),
}


@pytest.mark.parametrize(
    "wanted", [SparseWide(), SparseParallel(), SparseFactorized(), SparseDoped()], ids=lambda t: t.name
)
@pytest.mark.parametrize("name", [*IMAGE, *TEXT])
def test_published_models_are_transformed_whole(name, wanted):
    size = 32 if name.startswith("resnet56") else 64
    x = torch.randn(2, 3, size, size) if name in IMAGE else torch.randint(0, 50, (2, 7))
    build = (IMAGE | TEXT)[name]
    inputs = x if name in IMAGE else {"input_ids": x}
    given = build()
    model = transform(given, Plan(transform=wanted, sparsity=0.5), inputs)
    ends = (
        "it reads the model's input",
        "it makes the model's output",
        "it is of low rank",
        "depthwise convolution",
    )
    assert {why for why in dense(model).values() if why not in ends} == set()
    balance = model.origin.balance
    assert balance.layers_ratio(balance.sparsity) == pytest.approx(1)
    assert balance.layers_ratio(balance.nominal) == pytest.approx(1, abs=0.15)
    out = runs(model, x) if name in IMAGE else runs(model, input_ids=x)
    want = given(x) if name in IMAGE else given(input_ids=x).logits
    assert out.shape == want.shape
    if isinstance(wanted, SparseWide):
        assert list(shapes(model)) == list(shapes(given))

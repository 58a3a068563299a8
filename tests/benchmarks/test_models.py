"""The networks and numbers of GSE (arXiv:2401.06898) that need no data: parameters, densities, scaling."""

import pytest
import torch

from benchmarks.models import (
    ByteTransformer,
    CifarResNet18,
    DigitsResNet,
    MobileNetV1,
    ResNet56,
    SimpleViT,
    SmallVGG16,
    WideResNet,
)
from benchmarks.models.published import WHOLE, Published, linear
from fxsparse.allocation import Target, target_densities
from fxsparse.allocation.er_unrolled import er_unrolled
from fxsparse.globs import matches, unmatched
from fxsparse.pipeline import WeightSpec


def on_meta(build, **options):
    with torch.device("meta"):
        return build(**options)


def weights_of(model):
    return [
        WeightSpec(name, "linear" if p.dim() == 2 else "conv2d", tuple(p.shape), p.dtype)
        for name, p in model.named_parameters()
        if p.dim() > 1
    ]


def sides(specs):
    """Inputs and outputs of all unrolled matrices, added up."""
    return sum(s.shape[0] + s.numel // s.shape[0] for s in specs)


@pytest.mark.parametrize(
    ("build", "classes", "parameters"),
    [
        (ResNet56, 10, 853_018),
        (ResNet56, 100, 858_868),
        (SmallVGG16, 10, 1_256_730),
        (SmallVGG16, 100, 1_302_900),
        (SimpleViT, 10, 4_237_930),
    ],
)
def test_parameters(build, classes, parameters):
    assert sum(p.numel() for p in on_meta(build, classes=classes).parameters()) == parameters


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("build", [ResNet56, SmallVGG16, SimpleViT])
def test_forward_at_every_width(build, width):
    model = build(width=width).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("build", [CifarResNet18, MobileNetV1, WideResNet])
def test_forward_of_the_other_papers_models(build):
    size = 224 if build is MobileNetV1 else 32
    out = on_meta(build)(torch.empty(2, 3, size, size, device="meta"))
    assert out.shape == (2, 1000 if build is MobileNetV1 else 10)


def test_models_of_the_tasks():
    assert DigitsResNet().eval()(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert ByteTransformer()(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 16, 256)
    assert 250_000 < sum(p.numel() for p in on_meta(ByteTransformer).parameters()) < 350_000


def test_option_a_keeps_the_input_where_a_block_adds_nothing():
    block = ResNet56().blocks[9].eval()  # 16 to 32 channels at stride 2
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].count_nonzero() == out[:, 24:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("sparsity", "scale", "first", "classifier"),
    [
        (0.90, 4.278, 0.426, 0.495),
        (0.95, 2.139, 0.213, 0.247),
        (0.98, 0.856, 0.085, 0.099),
        (0.99, 0.428, 0.043, 0.049),
    ],
)
def test_er_densities_of_resnet56(sparsity, scale, first, classifier):
    specs = weights_of(on_meta(ResNet56))
    densities = target_densities("er_unrolled", specs, Target(sparsity))
    assert sides(specs) == 19_845
    assert round((1 - sparsity) * sum(s.numel for s in specs) / sides(specs), 3) == scale
    assert round(densities["conv1.weight"], 3) == first
    assert densities["linear.weight"] == pytest.approx(
        classifier, abs=1e-3
    )  # published digits are cut, not rounded
    assert max(densities.values()) < 1
    assert sum(er_unrolled(specs, Target(sparsity)).values()) == Target(sparsity).free_total(specs)


def test_er_clips_two_layers_of_vgg16():
    specs = weights_of(on_meta(SmallVGG16))
    densities = target_densities("er_unrolled", specs, Target(0.9))
    counts = er_unrolled(specs, Target(0.9))
    clipped = {name for name, density in densities.items() if density == 1}
    assert clipped == {"features.0.weight", "classifier.6.weight"}  # 27 and 10 are short sides
    assert round(1 - sum(counts.values()) / sum(s.numel for s in specs), 4) == 0.9004


@pytest.mark.parametrize(
    ("build", "width", "weights", "sparsity", "total_sides"),
    [
        (ResNet56, 1, 854_704, 0.98, 19_935),
        (ResNet56, 2, 3_405_152, 0.99498, 39_743),
        (ResNet56, 4, 13_593_280, 0.99874, 79_359),
        (SmallVGG16, 1, 1_298_608, 0.98, 11_711),
        (SmallVGG16, 2, 5_091_168, 0.99490, 23_295),
        (SmallVGG16, 4, 20_158_144, 0.99871, 46_463),
    ],
)
def test_scaling_at_constant_nonzeros(build, width, weights, sparsity, total_sides):
    nonzeros = 0.02 * sum(s.numel for s in weights_of(on_meta(build, classes=100)))
    specs = weights_of(on_meta(build, classes=100, width=width))
    numel = sum(s.numel for s in specs)
    assert (numel, sides(specs)) == (weights, total_sides)
    assert round(1 - nonzeros / numel, 5) == sparsity


@pytest.mark.parametrize(("width", "scale"), [(1, 0.857), (2, 1.714), (4, 3.426)])
def test_at_constant_sparsity_the_scale_grows_with_the_width(width, scale):
    specs = weights_of(on_meta(ResNet56, classes=100, width=width))
    assert round(0.02 * sum(s.numel for s in specs) / sides(specs), 3) == scale


@pytest.mark.parametrize(
    ("name", "pruned", "kept"),
    [
        ("ResNet-18", 19, 2),
        ("ResNet-50", 52, 2),
        ("MobileNetV2", 34, 19),
        ("ViT-B/16", 48, 4),
        ("BERT-base", 72, 5),
        ("GPT-2", 48, 2),
    ],
)
def test_stem_head_and_embeddings_of_published_models_stay_dense(name, pruned, kept):
    model = on_meta(WHOLE[name].build)
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    assert not unmatched(WHOLE[name].dense, names)
    dense = [n for n in names if any(matches(glob, n) for glob in WHOLE[name].dense)]
    assert (len(names) - len(dense), len(dense)) == (pruned, kept)


def test_a_pruned_model_has_the_zeros_and_settled_norms():
    model = Published(
        lambda: torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 3)
        ),
        lambda batch: torch.randn(batch, 3, 8, 8) + 5,
        ("0",),
    ).pruned(0.75)
    first, norm, second = model
    assert not model.training
    assert (first.weight != 0).all()
    assert (second.weight == 0).sum() == 0.75 * second.weight.numel()
    assert norm.running_mean.abs().min() > 0
    assert linear(8, 4).pruned(0.5).weight.count_nonzero() == 16

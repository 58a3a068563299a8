"""RigL's published tables: ResNet-50, CIFAR ResNet-18, WRN-22-2 and MobileNet-v1 (arXiv:1911.11134)."""

from math import ceil

import pytest
import torchvision

from fxsparse.allocation import Target
from fxsparse.allocation.erk import erk_densities
from fxsparse.flops import Stored, count_program
from fxsparse.flops.rigl import rigl_bytes

CONV1 = {"conv1.weight": 0.0}


def flops(graph, held=None):
    return count_program(graph, held, convention="rigl").total


def megabytes(specs, held=None):
    size = rigl_bytes((s.shape, held[s.name].nnz if held else s.numel) for s in specs)
    return round(size / 1e6, 3)


@pytest.fixture(scope="module")
def resnet50(traced_on_meta):
    return traced_on_meta(torchvision.models.resnet50, 2, 3, 224, 224)


def test_dense_resnet50(resnet50):
    graph, specs = resnet50
    assert flops(graph) == 8_189_482_496
    assert sum(s.numel for s in specs) == 25_502_912
    assert megabytes(specs) == 102.122


@pytest.mark.parametrize(
    ("policy", "sparsity", "billions", "size"),
    [
        ("erk", 0.8, 3.395292, 23.684),
        ("erk", 0.9, 1.988961, 13.499),
        ("uniform", 0.8, 1.835610, 23.729),
        ("uniform", 0.9, 1.041376, None),
    ],
)
def test_sparse_resnet50(resnet50, stored, policy, sparsity, billions, size):
    graph, specs = resnet50
    held = stored(specs, policy, sparsity, forced=CONV1 if policy == "uniform" else {})
    assert round(flops(graph, held) / 1e9, 6) == billions
    assert size in (None, megabytes(specs, held))


@pytest.mark.parametrize(("sparsity", "ratio"), [(0.8, 0.454), (0.9, 0.258), (0.95, 0.144)])
def test_resnet50_with_er_that_ignores_kernels(resnet50, stored, sparsity, ratio):
    graph, specs = resnet50
    assert round(flops(graph, stored(specs, "er", sparsity)) / 8_189_482_496, 3) == ratio


def test_other_conventions_count_the_entries_that_are_there(resnet50, stored):
    graph, specs = resnet50
    held = stored(specs, "erk", 0.8)
    # 56 x 56 positions
    assert count_program(graph, held).of_weight("layer1.0.conv2.weight") == (
        2 * 3136 * 36_864,
        2 * 3136 * held["layer1.0.conv2.weight"].nnz,
        2 * 3136 * 36_864,
    )


@pytest.mark.parametrize(
    ("sparsity", "ratio"), [(0.8, 0.5081), (0.9, 0.2486), (0.95, 0.1255), (0.99, 0.0257)]
)
def test_cifar_resnet18(traced_on_meta, paper_models, stored, sparsity, ratio):
    graph, specs = traced_on_meta(paper_models.CifarResNet18, 2, 3, 32, 32)
    assert sum(s.numel for s in specs) == 11_164_352
    dense = flops(graph)
    assert round(dense / 1e9, 5) == 1.11146
    assert round(flops(graph, stored(specs, "erk", sparsity)) / dense, 4) == ratio


@pytest.mark.parametrize(
    ("sparsity", "erk", "uniform"), [(0.8, 0.3529, 0.2033), (0.9, 0.1747, 0.1037), (0.95, 0.0893, 0.0539)]
)
def test_wide_resnet(traced_on_meta, paper_models, stored, sparsity, erk, uniform):
    graph, specs = traced_on_meta(paper_models.WideResNet, 2, 3, 32, 32)
    assert sum(s.numel for s in specs) == 1_076_912
    dense = flops(graph)
    assert round(dense / 1e8, 4) == 3.1588
    assert round(flops(graph, stored(specs, "erk", sparsity)) / dense, 4) == erk
    assert round(flops(graph, stored(specs, "uniform", sparsity, forced=CONV1)) / dense, 4) == uniform


@pytest.fixture(scope="module")
def mobilenet(traced_on_meta, paper_models):
    return traced_on_meta(paper_models.MobileNetV1, 2, 3, 224, 224)


def depthwise(specs):
    return {s.name: 0.0 for s in specs if "depthwise" in s.name}


def test_dense_mobilenet(mobilenet):
    graph, specs = mobilenet
    assert round(flops(graph) / 1e6, 3) == 1141.544
    assert megabytes(specs) == 16.864


@pytest.mark.parametrize(
    ("sparsity", "millions", "size"),
    [(0.75, 599.144, 4.888), (0.85, 439.152, 3.224), (0.9, 334.134, 2.392), (0.95, 205.281, 1.560)],
)
def test_mobilenet_with_erk(mobilenet, sparsity, millions, size):
    # Depthwise layers are left dense and out of the budget; conv1 is ERK's to decide, and dense up to 0.9.
    graph, specs = mobilenet
    target = Target(sparsity, forced=depthwise(specs))
    density = erk_densities(specs, target, zeros=ceil) | dict.fromkeys(target.forced, 1.0)
    held = {s.name: Stored(int(density[s.name] * s.numel), s.numel, density=density[s.name]) for s in specs}
    assert round(flops(graph, held) / 1e6, 3) == millions
    assert megabytes(specs, held) == size


@pytest.mark.parametrize(
    ("sparsity", "millions", "real"),
    [(0.75, 330.769, 0.742), (0.85, 222.666, 0.841), (0.9, 168.614, 0.890), (0.95, 114.563, 0.940)],
)
def test_mobilenet_with_uniform(mobilenet, stored, sparsity, millions, real):
    graph, specs = mobilenet
    held = stored(specs, "uniform", sparsity, forced=depthwise(specs) | CONV1)
    assert round(flops(graph, held) / 1e6, 3) == millions
    kept = sum(h.nnz for h in held.values()) / sum(s.numel for s in specs)
    assert round(1 - kept, 3) == real

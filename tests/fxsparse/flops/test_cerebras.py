"""The integers of the reference profiler behind Sparse-IFT's budgets."""

import torchvision

from fxsparse.flops import call_sites, count_program
from fxsparse.flops.cerebras import cerebras_macs
from fxsparse.flops.site import BATCH


def macs(graph):
    return sum(cerebras_macs(site.at({BATCH: 1})) for site in call_sites(graph).found)


def test_resnet18_on_cifar_100(traced_on_meta, paper_models):
    graph, _ = traced_on_meta(lambda: paper_models.CifarResNet18(classes=100), 2, 3, 32, 32)
    assert count_program(graph, convention="cerebras").dense == 1_115_226_800
    assert macs(graph) == 557_312_000


def test_resnet18_on_imagenet(traced_on_meta):
    graph, _ = traced_on_meta(torchvision.models.resnet18, 2, 3, 224, 224)
    assert count_program(graph, convention="cerebras").dense == 3_647_128_359
    assert macs(graph) == 1_821_524_992


def test_sparse_additions_and_multiplications_are_truncated_apart(traced_on_meta, stored):
    graph, specs = traced_on_meta(torchvision.models.resnet18, 2, 3, 224, 224)
    held = stored(specs, "uniform", 0.9)
    _, sparse, _ = count_program(graph, held, convention="cerebras").of_weight("fc.weight")
    density = held["fc.weight"].nnz / 512_000
    assert sparse == int(511 * 1000 * density) + int(512 * 1000 * density) + 1000

import pytest
import torchvision

from fxsparse.flops import count_program


def test_resnet50_multiply_adds(traced_on_meta):
    graph, _ = traced_on_meta(torchvision.models.resnet50, 2, 3, 224, 224)
    assert count_program(graph).dense == 2 * 4_089_184_256


@pytest.mark.parametrize(
    ("policy", "sparsity", "ratio", "last_place"),
    [
        ("er_unrolled", 0.8, 0.462, 1e-3),
        ("er_unrolled", 0.9, 0.249, 1e-3),
        ("er_unrolled", 0.95, 0.1245, 1e-4),
        ("er_unrolled", 0.99, 0.0249, 1e-4),
        ("erk", 0.8, 0.414, 1e-3),
        ("erk", 0.9, 0.242, 1e-3),
        ("erk", 0.95, 0.122, 1e-3),
        ("erk", 0.99, 0.0243, 1e-4),
    ],
)
def test_resnet50_ratios_of_gse(traced_on_meta, stored, policy, sparsity, ratio, last_place):
    graph, specs = traced_on_meta(torchvision.models.resnet50, 2, 3, 224, 224)
    got = count_program(graph, stored(specs, policy, sparsity)).total / 8_178_368_512
    assert got == pytest.approx(ratio, abs=last_place)


def test_vit_b_16(traced_on_meta, stored):
    # Published: weights 16.8485 G and attention 0.7153 G multiply-adds at 224 x 224.
    graph, specs = traced_on_meta(torchvision.models.vit_b_16, 2, 3, 224, 224)
    count = count_program(graph)
    attention = sum(layer.dense for layer in count.layers if layer.op == "attention")
    assert round(count.dense / 2e9, 3) == 17.564
    assert round(attention / 2e9, 4) == 0.7153
    assert round((count.dense - attention) / 2e9, 4) == 16.8485
    for sparsity, ratio in ((0.8, 0.2320), (0.9, 0.1360)):
        held = stored(specs, "uniform", sparsity)
        # attention is dense at any sparsity
        expected = ((1 - sparsity) * (count.dense - attention) + attention) / count.dense
        assert count_program(graph, held).total / count.dense == pytest.approx(expected, rel=1e-6)
        assert expected == pytest.approx(ratio, abs=1e-3)

import torch

from benchmarks.agreement import build, measure


def test_a_family_agrees_and_says_what_its_weights_run_on():
    found = measure({"family": "SqueezeNet"})
    assert 0 < found["error"] < 1e-4
    assert sum(int(part.split()[0]) for part in found["kernels"].split(", ")) == 26


def test_no_layer_of_a_model_is_hidden():
    model = build("convnext_tiny")()
    scales = [p for name, p in model.named_parameters() if name.endswith("layer_scale")]
    assert len(scales) == 18
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale in scales)
    assert build("vit_b_32")().get_parameter("heads.head.weight").any()

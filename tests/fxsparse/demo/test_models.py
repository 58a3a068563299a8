import pytest
import torch

from fxsparse.demo import models


@pytest.mark.parametrize("build", [models.vit, models.mlp, models.cnn])
def test_maps_digit_images_to_ten_scores_and_trains_every_parameter(build):
    model = build()
    scores = model(torch.randn(3, 1, 8, 8))
    assert scores.shape == (3, 10)
    scores.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_attention_is_permutation_equivariant():
    attention = models.Attention(width=8, heads=2)
    x, order = torch.randn(2, 5, 8), torch.randperm(5)
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])


def test_vit_pools_over_position_aware_patches():
    model, image = models.vit().eval(), torch.randn(1, 1, 8, 8)
    swapped = torch.cat([image[..., 4:, :], image[..., :4, :]], dim=-2)
    assert not torch.allclose(model(image), model(swapped))

import pytest
import torch

from fxsparse.errors import PlanError
from fxsparse.weight_init import weight_init_named


@pytest.mark.parametrize(
    ("name", "fan_in", "deviation"),
    [("grad_flow", 100, 0.1414), ("grad_flow", 8, 0.5), ("grad_flow_srigl", 100, 0.02)],
)
def test_the_deviation_follows_each_neurons_fan_in(name, fan_in, deviation):
    init = weight_init_named(name)
    assert init is not None
    counts = torch.tensor([fan_in, 4 * fan_in]).repeat_interleave(200_000).float()
    values = init(counts, torch.Generator().manual_seed(0))
    first, second = values.view(2, -1)
    assert first.std() == pytest.approx(deviation, rel=0.01)
    assert second.std() == pytest.approx(deviation / (2 if name == "grad_flow" else 4), rel=0.01)
    assert abs(first.mean()) < 0.01 * deviation


def test_keep_draws_nothing_and_other_names_are_refused():
    assert weight_init_named("keep") is None
    with pytest.raises(
        PlanError,
        match="expected weight_init as one of grad_flow, grad_flow_srigl, unit_variance, keep, got 'he'",
    ):
        weight_init_named("he")

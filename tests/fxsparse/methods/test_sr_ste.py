import torch

from fxsparse.method import Probe
from fxsparse.methods import sr_ste
from fxsparse.pattern import NM
from fxsparse.reparam import StraightThrough
from fxsparse.testing import view_of


def test_the_mask_follows_every_step():
    schedule = sr_ste().schedule
    assert schedule is not None
    assert list(schedule.updates(5)) == [1, 2, 3, 4]
    assert not schedule.skip_step


def test_the_gradient_is_dense_at_every_step_and_updates_need_none():
    method = sr_ste()
    assert method.reparam == StraightThrough(2e-4)
    assert method.reparam.probe is Probe.DENSE
    assert method.rule is not None
    assert method.rule.probe is Probe.NONE


def test_a_hidden_weight_that_grew_past_an_active_one_takes_its_place():
    weight = torch.tensor([[0.5, 0.4, 0.6, 0.1]])
    mask = torch.tensor([[True, True, False, False]])
    method = sr_ste()
    assert method.rule is not None
    chosen = method.rule(view_of(method, NM(2, 4), weight, mask, torch.zeros(1, 4), nnz=2, step=1))
    assert chosen.tolist() == [0, 2]

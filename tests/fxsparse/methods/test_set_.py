from fxsparse.method import Probe
from fxsparse.methods import set_
from fxsparse.schedule import Cosine


def test_moves_after_every_epoch_by_a_constant_fraction():
    schedule = set_(every=50).schedule
    assert schedule is not None
    assert list(schedule.updates(200)) == [50, 100, 150]
    assert not schedule.skip_step
    assert [schedule.drop_fraction(t) for t in (50, 10_000)] == [0.3, 0.3]


def test_needs_no_probe():
    rule = set_().rule
    assert rule is not None
    assert rule.probe is Probe.NONE


def test_as_in_rigls_paper():
    schedule = set_(every=100, stop=25_000, decay="cosine").schedule
    assert schedule is not None
    assert schedule.drop_fraction == Cosine(0.3, 25_000)
    assert list(schedule.updates(32_000))[-1] == 24_900

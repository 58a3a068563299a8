from fxsparse.method import Probe
from fxsparse.methods import rigl
from fxsparse.reparam import HardMask
from fxsparse.schedule import Constant, InversePower


def test_defaults_are_algorithm_1():
    method = rigl()
    assert method.schedule is not None
    updates = method.schedule.updates(32_000)
    assert (updates[0], updates[1], updates[-1], len(updates)) == (0, 100, 24_900, 250)
    assert method.schedule.skip_step
    assert method.schedule.drop_fraction(0) == 0.3
    assert method.schedule.drop_fraction(12_500) == 0.15
    assert method.reparam == HardMask()


def test_torch_variant_steps_first_and_begins_one_interval_in():
    schedule = rigl(variant="torch").schedule
    assert schedule is not None
    updates = schedule.updates(32_000)
    assert (updates[0], updates[-1], len(updates)) == (100, 24_900, 249)
    assert not schedule.skip_step


def test_drop_fraction_alternatives_of_appendix_g():
    def curve(decay):
        schedule = rigl(decay=decay).schedule
        assert schedule is not None
        return schedule.drop_fraction

    assert curve("constant") == Constant(0.3)
    assert curve("linear") == InversePower(0.3, 25_000, 1)
    assert curve("cubic") == InversePower(0.3, 25_000, 3)


def test_asks_for_a_dense_gradient_at_updates_only():
    method = rigl()
    assert method.rule is not None
    assert method.rule.probe is Probe.DENSE
    assert method.reparam.probe is Probe.NONE


def test_nnz_does_not_move():
    assert {rigl().nnz(t, final=10, numel=100) for t in (-1, 0, 100, 40_000)} == {10}

from fxsparse.methods import gmp
from fxsparse.reparam import HiddenMask


def test_updates_include_the_end_of_the_ramp():
    schedule = gmp().schedule
    assert schedule is not None
    updates = schedule.updates(32_000)
    assert (updates[0], updates[1], updates[-1], len(updates)) == (10_000, 11_000, 25_000, 16)
    assert not schedule.skip_step


def test_nnz_follows_the_ramp_between_its_ends():
    # Updates at 0, 10, 20, 30, 40 of stop 40: 1000 * 0.9 * (1 - x)^3 + 100 at x = 0, 1/4, 1/2, 3/4, 1 is
    # 1000, 479.6875, 212.5, 114.0625, 100; 0.9 * 125 = 112.5 rounds to the even 112.
    method = gmp(start=0, stop=40, every=10)
    assert [method.nnz(t, 100, 1000) for t in (0, 10, 20, 30, 40)] == [1000, 480, 212, 114, 100]


def test_nnz_between_updates_is_that_of_the_last_one():
    method = gmp(start=20, stop=40, every=10)
    # Dense before the first update; halfway, 900 / 8 + 100.
    assert [method.nnz(t, 100, 1000) for t in (-1, 0, 19, 29)] == [1000, 1000, 1000, 1000]
    assert [method.nnz(t, 100, 1000) for t in (30, 39, 40, 10_000)] == [212, 212, 100, 100]


def test_initial_sparsity_is_where_the_ramp_begins():
    assert gmp(initial_sparsity=0.5).nnz(-1, 100, 1000) == 500


def test_pruned_weights_keep_their_value():
    assert gmp().reparam == HiddenMask()

import pytest

from fxsparse.errors import PlanError
from fxsparse.schedule import Constant, Cosine, CubicRamp, InversePower, Rising, Schedule, decay_curve


@pytest.mark.parametrize(
    ("step", "fraction"),
    [
        (0, 0.3),
        (100, 0.29998815663),
        (6250, 0.25606601718),
        (12500, 0.15),
        (18750, 0.04393398282),
        (24900, 1.18434e-5),
    ],
)
def test_cosine_has_the_published_values(step, fraction):
    assert Cosine(0.3, 25_000)(step) == pytest.approx(fraction, rel=1e-5)


def test_inverse_power_falls_by_its_power():
    # Halfway a half and an eighth are left.
    assert [InversePower(0.4, 100, 1)(t) for t in (0, 50, 100)] == [0.4, 0.2, 0.0]
    assert [InversePower(0.4, 100, 3)(t) for t in (0, 50, 100)] == [0.4, 0.05, 0.0]


def test_curves_stay_at_zero_after_their_stop():
    assert Cosine(0.3, 100)(150) == 0.0
    assert InversePower(0.3, 100, 3)(150) == 0.0
    assert Constant(0.3)(150) == 0.3


def test_curves_by_name():
    assert decay_curve("constant", 0.3, None) == Constant(0.3)
    assert decay_curve("cosine", 0.3, 9) == Cosine(0.3, 9)
    assert decay_curve("linear", 0.3, 9) == InversePower(0.3, 9, 1)
    assert decay_curve("cubic", 0.3, 9) == InversePower(0.3, 9, 3)


@pytest.mark.parametrize(
    ("schedule", "first", "last", "count"),
    [
        # Step, inclusive end and order as each implementation has them; T_end = 25,000 and dT = 100.
        (Schedule(100, 25_000, start=0, skip_step=True), 0, 24_900, 250),  # RigL, Algorithm 1
        (Schedule(100, 25_001, start=0, skip_step=True), 0, 25_000, 251),  # RigL's code: step <= end_step
        (Schedule(100, 25_000, start=100), 100, 24_900, 249),  # PyTorch ports
        (Schedule(100, 25_001, start=100), 100, 25_000, 250),  # the same with an inclusive end
    ],
)
def test_update_steps_of_the_known_implementations(schedule, first, last, count):
    fired = [step for step in range(32_000) if schedule.fires(step)]
    assert (fired[0], fired[-1], len(fired)) == (first, last, count)
    assert fired == list(schedule.updates(32_000))


def test_the_last_update_is_the_one_that_set_the_current_masks():
    schedule = Schedule(10, 31, start=5)  # 5, 15, 25
    assert [schedule.last_update(t) for t in (-1, 4, 5, 14, 15, 30, 99)] == [-1, -1, 5, 5, 15, 25, 25]
    assert Schedule(10).last_update(25) == 20


def test_cubic_ramp_of_nonzeros():
    # Density 0.1 plus 0.4 times the cube of what is left, of 1,000 entries, rounded.
    ramp = CubicRamp(0.5, start=0, stop=10)
    nnz = [ramp(j, 100, 1000) for j in range(11)]
    assert nnz == [500, 392, 305, 237, 186, 150, 126, 111, 103, 100, 100]


def test_cubic_ramp_is_exact_at_both_ends_and_outside():
    # 0.9 * (1 - (1 - x)^3) at x = 0, 1/4, 1/2, 1 is 0, 0.5203125, 0.7875, 0.9.
    ramp = CubicRamp(0.0, start=10_000, stop=26_000)
    nnz = [ramp(t, 6_400, 64_000) for t in (-1, 0, 10_000, 14_000, 18_000, 26_000, 90_000)]
    assert nnz == [64_000, 64_000, 64_000, 30_700, 13_600, 6_400, 6_400]


def test_a_ramp_never_starts_below_its_end():
    assert CubicRamp(0.9, 0, 10)(0, final=500, numel=1000) == 500


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Schedule(0), "every as an integer >= 1, got 0"),
        (lambda: Schedule(True), "every as an integer >= 1, got True"),
        (lambda: Schedule(10, start=-1), "start as an integer >= 0, got -1"),
        (lambda: Schedule(10, stop=5, start=6), "stop as an integer >= 6, got 5"),
        (lambda: Constant(1.5), "drop fraction as a number from 0 to 1, got 1.5"),
        (lambda: Constant(float("nan")), "drop fraction as a number from 0 to 1, got nan"),
        (lambda: Cosine(-0.1, 10), "drop fraction as a number from 0 to 1, got -0.1"),
        (lambda: Cosine(0.3, 0), "stop as an integer >= 1, got 0"),
        (lambda: InversePower(0.3, 10, 0), "power as an integer >= 1, got 0"),
        (lambda: CubicRamp(1.2, 0, 10), "initial_sparsity as a number from 0 to 1, got 1.2"),
        (lambda: CubicRamp(0.0, 10, 10), "stop as an integer >= 11, got 10"),
        (lambda: decay_curve("cosin", 0.3, 10), "one of constant, cosine, linear, cubic, got 'cosin'"),
        (lambda: decay_curve("cosine", 0.3, None), "stop as an integer for decay='cosine', got None"),
    ],
)
def test_impossible_schedules_are_refused(build, message):
    with pytest.raises(PlanError, match=message):
        build()


def test_rising_goes_from_0_along_a_cubic_and_stays():
    share = Rising(0.8, 10, 30)
    assert [share(step) for step in (0, 10, 20, 30, 99)] == pytest.approx([0, 0, 0.7, 0.8, 0.8])

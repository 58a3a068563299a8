import pytest

from fxsparse import timing
from fxsparse.timing import interleaved_medians


class Clock:
    """Time moves only when a call takes some."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def taking(self, *seconds):
        """A call that takes each of these times in turn."""
        left = list(seconds)

        def call():
            self.now += left.pop(0)

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_calls_take_turns():
    seen = []
    calls = {"first": lambda: seen.append(1), "second": lambda: seen.append(2)}
    interleaved_medians(calls, rounds=2, warm_up=1)
    assert seen == [1, 2] * 3


def test_the_median_is_in_microseconds_and_leaves_out_the_warm_up(clock):
    medians = interleaved_medians({"call": clock.taking(8, 0.5, 0.25, 4)}, rounds=3, warm_up=1)
    assert medians == {"call": 500_000}


def test_the_time_is_that_of_one_call_of_a_turn(clock):
    medians = interleaved_medians({"call": clock.taking(*[0.5] * 8)}, rounds=2, warm_up=0, inner=4)
    assert medians == {"call": 500_000}


def test_a_quarter_of_the_turns_is_below_the_lower_quartile(clock):
    quartiles = timing.interleaved_quartiles(
        {"call": clock.taking(8, 1, 2, 9, 3, 9, 9, 9)}, rounds=8, seconds=1e9
    )
    assert quartiles == {"call": 3e6}


def test_turns_end_after_five_once_they_have_taken_long(clock):
    calls = {"slow": clock.taking(*[2.0] * 5), "fast": clock.taking(*[1.0] * 5)}
    assert timing.interleaved_quartiles(calls, rounds=20, seconds=4) == {"slow": 2e6, "fast": 1e6}


def test_calls_that_are_long_and_less_than_half_as_fast_have_two_turns(clock):
    calls = {
        "slow": clock.taking(5.0, 5.0),
        "half": clock.taking(*[2.0] * 5),
        "fast": clock.taking(*[1.0] * 5),
    }
    found = timing.interleaved_quartiles(calls, rounds=20, seconds=20)
    assert found == {"slow": 5e6, "half": 2e6, "fast": 1e6}


def test_short_calls_have_all_their_turns(clock):
    calls = {"slow": clock.taking(*[5.0] * 7), "fast": clock.taking(*[1.0] * 7)}
    assert timing.interleaved_quartiles(calls, rounds=7, seconds=1000) == {"slow": 5e6, "fast": 1e6}

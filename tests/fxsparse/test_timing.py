import time

from fxsparse.timing import interleaved_medians


def test_calls_take_turns_and_warm_up_is_not_counted():
    seen = []

    def first():
        seen.append("first")
        time.sleep(0.05 if len(seen) == 1 else 0)

    medians = interleaved_medians(
        {"first": first, "second": lambda: seen.append("second")}, rounds=2, warm_up=1
    )
    assert seen == ["first", "second"] * 3
    assert medians["first"] < 50_000


def test_the_median_is_in_microseconds():
    medians = interleaved_medians({"sleep": lambda: time.sleep(0.002)}, rounds=3, warm_up=0)
    assert 2_000 <= medians["sleep"] < 200_000

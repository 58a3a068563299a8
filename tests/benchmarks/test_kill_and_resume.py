"""A training process that is killed at random moments goes on as if nothing had happened."""

from benchmarks.kill_and_resume import kill_and_resume


def test_resuming_after_kills_is_bit_exact_and_no_file_is_ever_half_written() -> None:
    reached = kill_and_resume(kills=3, steps=60)
    assert len(reached) == 3
    assert all(0 < step < 60 for step in reached)

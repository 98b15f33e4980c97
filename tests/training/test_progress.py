"""What a person and a log are told of work under way."""

import pytest

from training import progress
from training.progress import counting, duration


class Clock:
    """A clock that goes on by 30 s whenever it is asked."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 30.0
        return self.now


def test_a_log_is_told_how_long_it_takes_and_not_too_often(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(progress, "time", Clock())
    with counting("Epoch 3/5", 100, rounds_after=2) as advance:
        for _ in range(4):
            advance(25, note="100 images/s")
    captured = capsys.readouterr()
    assert captured.out == ""
    # Half of an epoch took 60 s: as long again, and then two more.
    assert captured.err.splitlines() == [
        "Epoch 3/5: 50%  100 images/s  1 min 00 s left, 5 min 00 s in all",
        "Epoch 3/5: 100%  100 images/s  0 s left, 4 min 00 s in all",
    ]


def test_what_is_quickly_done_leaves_no_line_in_a_log(capsys):
    with counting("Decoding", 3) as advance:
        advance(3)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (324.1, "5 min 24 s"), (7500, "2 h 05 min")]
)
def test_a_span_of_time_is_told_as_people_say_it(seconds, words):
    assert duration(seconds) == words


def test_what_nobody_knows_the_length_of_is_counted_all_the_same(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(progress, "time", Clock())
    with counting("Fetching", 0) as advance:
        for _ in range(3):
            advance(1500)
    assert capsys.readouterr().err.splitlines() == ["Fetching: 3,000  "]

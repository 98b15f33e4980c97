"""What whoever waits for a model is told meanwhile."""

import logging

import pytest

from app.metrics import Metrics
from app.pages import WriterState, private_page
from app.probes import Probes, readiness
from app.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_step_is_told_with_its_seconds_and_an_inner_one_in_its_place(caplog):
    clock = Clock()
    progress = Progress(clock)
    assert progress.told == ""
    with caplog.at_level(logging.INFO), progress.step("pets 1"):
        assert progress.told == "", "what has only begun is not worth a word"
        clock.now = 3.4
        assert progress.told == "pets 1, for 3 s"
        with progress.step("pets 1: session 1 of 2"):
            clock.now += 100
            assert progress.told == "pets 1: session 1 of 2, for 100 s"
        assert progress.told == "pets 1, for 103 s"
        with progress.step("pets 1: session 2 of 2"):
            clock.now += 0.5
    assert progress.told == ""
    assert [(record.step, record.seconds) for record in caplog.records] == [
        ("pets 1: session 1 of 2", 100.0),
        ("pets 1", 103.9),
    ], "a step that took long is in the log"


def test_a_step_that_failed_is_over():
    progress = Progress(Clock())
    with pytest.raises(ValueError, match="broken"), progress.step("pets 1"):
        raise ValueError("broken")
    assert progress.told == ""


def test_readiness_tells_what_is_being_loaded_and_of_engines_rather_than_of_those_who_wait_for_them():
    worker, engine = private_page(), private_page()
    for page in (worker, engine):
        page.take_over(1)
        page.beat()
    worker.tell(WriterState.LOADING, {"reason": "Loading: pets.", "models": {}, "loading": "pets 1: waiting, for 9 s"})
    engine.tell(WriterState.READY, {"loading": "pets 1: session 1 of 2, for 9 s"})
    status, told = readiness([worker])
    assert (status, told["loading"]) == (503, ["pets 1: waiting, for 9 s"])
    _, told = Probes(Metrics(worker, [worker], engines=[engine])).ready()
    assert told["loading"] == ["pets 1: session 1 of 2, for 9 s"]
    engine.tell(WriterState.READY, {"loading": ""})
    _, told = Probes(Metrics(worker, [worker], engines=[engine])).ready()
    assert "loading" not in told

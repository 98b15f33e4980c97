import json
import logging
import signal
import subprocess
import sys

import pytest

from app.logs import JsonFormatter, TextFormatter, change_level, configure
from tests.app.watching import RED, messages, wait_for
from tests.servers import alone, convoy


def record(**fields: object) -> logging.LogRecord:
    line = logging.makeLogRecord(
        {"name": "convoy", "levelname": "INFO", "msg": "request", "created": 0.0, "msecs": 7.0}
    )
    vars(line).update(fields)
    return line


def test_json_has_the_fields_beside_the_message():
    line = json.loads(JsonFormatter().format(record(path="/predict", ms=1.5)))
    assert line == {
        "time": "1970-01-01T00:00:00.007Z",
        "level": "info",
        "logger": "convoy",
        "message": "request",
        "path": "/predict",
        "ms": 1.5,
    }


@pytest.mark.parametrize("evil", ["\u2028", "\x85", "\x9b2J", "\x7f", "\u202e", "\udcff"], ids=ascii)
def test_a_line_of_json_is_one_line_and_no_control_sequence_to_whoever_reads_it(evil):
    line = JsonFormatter().format(record(path=f"/x{evil}{{}}"))
    assert line.isprintable() and json.loads(line)["path"] == f"/x{evil}{{}}"


def test_letters_of_all_scripts_stay_readable_in_json():
    assert "Größe 大" in JsonFormatter().format(record(reason="Größe 大"))


def test_text_cannot_be_made_to_say_something_else():
    evil = "/x\n12:00:00 error database stolen\x1b[2J"
    line = TextFormatter().format(record(path=evil, status=404))
    assert "\n" not in line and "\x1b" not in line
    assert line.endswith(f"path={json.dumps(evil)} status=404")


def test_an_exception_is_kept():
    try:
        raise ValueError("broken")
    except ValueError as error:
        line = record(exc_info=(type(error), error, error.__traceback__))
    assert "ValueError: broken" in json.loads(JsonFormatter().format(line))["exception"]
    assert "ValueError: broken" in TextFormatter().format(line)


def test_the_level_moves_by_steps_and_stays_within(capsys):
    root, uvicorn = logging.getLogger(), logging.getLogger("uvicorn.error")
    kept = root.level, root.handlers[:], uvicorn.level
    try:
        configure("json", "warning")
        assert [change_level(step) for step in (1, 1, 1, -1)] == ["info", "debug", "debug", "info"]
        assert uvicorn.level == logging.WARNING
        assert [change_level(-1) for _ in range(3)] == ["warning", "error", "error"]
        assert uvicorn.level == logging.ERROR
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        assert [line["to"] for line in lines] == ["info", "debug", "debug", "info", "warning", "error", "error"]
    finally:
        root.setLevel(kept[0])
        root.handlers[:] = kept[1]
        uvicorn.setLevel(kept[2])
        logging.captureWarnings(False)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("number", "answer"),
    [(signal.SIGHUP, "reloaded"), (signal.SIGUSR1, "log level changed"), (signal.SIGUSR2, "log level changed")],
)
def test_a_signal_that_asks_for_something_ends_no_service_that_has_just_begun(models, workers, number, answer):
    command = [sys.executable, "-m", "app.cli", "serve", "--models", str(models), "--port", "0"]
    command += ["--log-format", "json", "--workers", str(workers)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = (json.loads(line)["message"] for line in process.stderr)
            assert "listening" in said
            process.send_signal(number)  # at once: no loop runs yet
            assert answer in said
            process.terminate()
            assert process.wait(15) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("workers", [1, 2])
@alone
def test_a_signal_changes_the_level_in_every_process(models, tmp_path, workers):
    def levels() -> list[tuple[int | None, str]]:
        return sorted(
            (line.get("worker", 0), line["to"]) for line in server.lines() if line["message"] == "log level changed"
        )

    everybody = [0] if workers == 1 else [0, 1, 2]
    with convoy(models, tmp_path / "log", default_model="colours", workers=workers) as server:
        server.process.send_signal(signal.SIGUSR2)
        wait_for(lambda: levels() == [(number, "warning") for number in everybody])
        assert server.client.post("/predict", content=RED).status_code == 200
        server.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: len(levels()) == 2 * len(everybody))
        assert server.client.post("/predict", content=RED).status_code == 200
        assert server.stop() == 0
    # /readyz and /metrics have no line, so the one is the second prediction's.
    assert [line["path"] for line in messages(server, "request")] == ["/predict"]

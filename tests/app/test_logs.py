import json
import logging

from app.logs import JsonFormatter, TextFormatter


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

"""Logs: one JSON object a line for machines, one readable line on a terminal.

Owns the format; what is worth a line is decided where it happens, with `extra={…}` for its fields.
"""

import json
import logging
import sys
import time
from typing import Any

log = logging.getLogger(__name__)

LEVELS = ("error", "warning", "info", "debug")
"""From the fewest lines to the most."""
_PLAIN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


def configure(log_format: str, level: str, **common: object) -> None:
    """Send every log line to standard error in the given format (auto, json or text), with `common` fields in each."""
    if log_format == "auto":
        log_format = "text" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())

    def add_common(record: logging.LogRecord) -> bool:
        vars(record).update(common)
        return True

    handler.addFilter(add_common)
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[handler], force=True)
    _set_level(level)
    # A broken form is its client's fault, and the client is told.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


def change_level(steps: int) -> str:
    """Log more (positive) or less, by so many of `LEVELS`, and return the level that holds from now on."""
    now = logging.getLevelName(logging.getLogger().level).lower()
    level = LEVELS[min(max(LEVELS.index(now) + steps, 0), len(LEVELS) - 1)]
    _set_level(level)
    # At that very level, so that the line comes whatever it is.
    log.log(logging.getLevelName(level.upper()), "log level changed", extra={"from": now, "to": level})
    return level


def _set_level(level: str) -> None:
    number = logging.getLevelName(level.upper())
    logging.getLogger().setLevel(number)
    # uvicorn's own story (started, waiting, finished) repeats ours.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, number))


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a caller added with `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _PLAIN_FIELDS}


class JsonFormatter(logging.Formatter):
    """`{"time": RFC 3339 UTC, "level", "logger", "message", …fields}`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        text = json.dumps(line, ensure_ascii=False, default=str)
        # JSON lets Unicode's other ends of lines and a terminal's control characters stand as they are.
        return text if text.isprintable() else json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`12:00:00 info message key=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one readable line."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = " ".join(f"{name}={_plain(value)}" for name, value in fields_of(record).items())
        line = f"{clock} {record.levelname.lower():7} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _plain(value: object) -> str:
    """Write a value so that it cannot pass for another field, another line, or a terminal's control sequence."""
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)

"""Logging: each event is one line, with the ids of its request and its task."""

import contextlib
import json
import logging
import sys
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

# The exporter of spans logs several lines for each batch that it cannot send. span_export logs one
# line when that begins, and one when it ends.
_REPETITIVE = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")


def configure_logging(level: str, form: str, *more: Processor) -> None:
    """Write the log lines of this service and of libraries to standard error.

    `form` is console or json. `more` processors may add values to each line.
    """
    shared: list[Processor] = [
        _without_colour,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *more,
    ]
    render: list[Processor]
    if form == "console":
        render = [
            structlog.processors.format_exc_info,
            _escape_values,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    else:
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_dumps)]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Lossy(sys.stderr))),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in _REPETITIVE:
        logging.getLogger(name).setLevel(level if level == "DEBUG" else logging.CRITICAL)
    logging.getLogger("mail.log").setLevel(logging.WARNING)  # aiosmtpd logs each command at INFO


class _Lossy:
    """A stream that drops lines instead of raising OSError.

    So the service goes on working if the disk of its log is full.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def _without_colour(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Remove the coloured copy of the message that uvicorn adds."""
    event.pop("color_message", None)
    return event


def _dumps(event: EventDict, **options: Any) -> str:
    return json.dumps(event, separators=(",", ":"), **options)


def _escape_values(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Escape line breaks and terminal codes in values, so that clients cannot forge lines."""
    for key, value in event.items():
        if key == "exception":
            # The lines of a traceback are indented, so that none of them looks like an event.
            event[key] = "\n".join(f"  {_escape(line)}" for line in value.split("\n"))
        elif isinstance(value, str):
            event[key] = _escape(value)
    return event


def _escape(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")

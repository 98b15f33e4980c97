"""The command `convoy`: serve, predict, bench, tune, key, health. Parses words, prints answers; no more."""

import argparse
import http.client
import json
import logging
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from app import __version__
from app.bench import cli as bench_cli
from app.bench import tune as bench_tune
from app.errors import BadRequestError, ConvoyError, SettingsError
from app.settings import API_KEY_VARIABLE, Settings, flag_of, variable_of

if TYPE_CHECKING:  # loaded when a command needs them
    from app.offline import Classifier
    from app.remote import RemoteClassifier

log = logging.getLogger(__name__)

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
PREDICT_SETTINGS = ("settings", "models", "model_name", "device", "default_model", "max_image_pixels")
BENCH_SETTINGS = ("settings", "models")
KEY_SETTINGS = ("settings", "keys")
HEALTH_SETTINGS = ("settings", "host", "port", "probe_port", "tls_certificate", "tls_client_ca")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, 1 for a negative answer, 2 for a fault that the user can mend."""
    _open_closed_streams()
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except ConvoyError as error:
        print(f"convoy: {error.message}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `convoy predict … | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _open_closed_streams() -> None:
    """Open the null device where standard input, output or error is closed, as `2>&-` and some init systems leave them.

    Else the next socket or pipe would be descriptor 0, 1 or 2: processes started from here would take it for their own.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
            os.set_inheritable(opened, True)
            setattr(sys, name, os.fdopen(opened, mode, closefd=False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convoy", description="Serve convolutional image classifiers.")
    parser.add_argument("--version", action="version", version=f"convoy {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="answer over HTTP", description="Serve the models over HTTP.")
    _add_settings(serve, Settings.model_fields)
    serve.set_defaults(run=_serve)

    predict = commands.add_parser(
        "predict",
        help="classify image files",
        description="Classify image files, without a server, or by one with --url.",
    )
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    predict.add_argument("--model", help="which model; default: the default model")
    predict.add_argument(
        "--url", help="ask the service there, with the key in CONVOY_API_KEY if it is set; default: no service"
    )
    predict.add_argument("--top-k", type=int, default=5, metavar="K", help="classes per image (default: 5)")
    predict.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    _add_settings(predict, PREDICT_SETTINGS)
    predict.set_defaults(run=_predict)

    bench = commands.add_parser("bench", help="measure a running service", description=bench_cli.DESCRIPTION)
    bench_cli.add_flags(bench)
    _add_settings(bench, BENCH_SETTINGS)
    bench.set_defaults(run=lambda options: bench_cli.run(options, _settings(options)))

    tune = commands.add_parser(
        "tune", help="find the best settings for this machine", description=bench_tune.DESCRIPTION
    )
    bench_tune.add_flags(tune)
    _add_settings(tune, BENCH_SETTINGS)
    tune.set_defaults(run=lambda options: bench_tune.run(options, _settings(options)))

    key = commands.add_parser(
        "key",
        help="make an API key",
        description="Make an API key: it goes to standard output, this once, and only its SHA-256 into the key file. "
        "Without --keys the line for the file is shown on standard error instead.",
    )
    key.add_argument("name", metavar="NAME", help="whose key it is, for the log")
    key.add_argument(
        "--scopes", default="predict", metavar="SCOPES", help="some of predict,admin,metrics (default: predict)"
    )
    _add_settings(key, KEY_SETTINGS)
    key.set_defaults(run=_key)

    health = commands.add_parser(
        "health", help="exit 0 if the service is ready", description="Ask a running service whether it is ready."
    )
    _add_settings(health, HEALTH_SETTINGS)
    health.set_defaults(run=_health)
    return parser


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str] | dict[str, Any]) -> None:
    """Add a flag for each setting; what is not given stays out of the namespace, so that the environment counts."""
    group = parser.add_argument_group("settings", "Each is also an environment variable: --port is CONVOY_PORT.")
    for name in names:
        field = Settings.model_fields[name]
        description = f"{field.description} (default: {field.default})".replace("%", "%%")
        dest = f"setting_{name}"
        if field.annotation is bool:
            group.add_argument(
                flag_of(name),
                dest=dest,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=description,
            )
        else:
            metavar = variable_of(name).removeprefix("CONVOY_")
            group.add_argument(flag_of(name), dest=dest, default=argparse.SUPPRESS, metavar=metavar, help=description)


def _settings(options: argparse.Namespace) -> Settings:
    flags = {
        name.removeprefix("setting_"): value for name, value in vars(options).items() if name.startswith("setting_")
    }
    return Settings.from_sources(os.environ, flags)


def _serve(options: argparse.Namespace) -> NoReturn:
    from app import logs, workers

    settings = _settings(options)
    logs.configure(settings.log_format, settings.log_level)
    if API_KEY_VARIABLE in os.environ and not settings.keys:
        log.warning(
            "%s is a client's key and protects nothing here: a service reads %s", API_KEY_VARIABLE, "CONVOY_KEYS"
        )
    workers.serve(settings)
    # All is answered and said. A decode or a load that is stuck in native code would hold up the interpreter's own end,
    # or make it abort: neither may turn a clean drain into a crash.
    logging.shutdown()
    os._exit(0)


def _predict(options: argparse.Namespace) -> int:
    from app.offline import image_files
    from app.terminal import print_json, print_table

    if options.top_k < 1:
        raise BadRequestError(f"--top-k cannot be {options.top_k}: at least one class is shown.")
    files = image_files(options.images)
    answers = _classifier(options).classify(files, options.top_k)
    show = print_json if options.json else print_table
    failures = show(answers, len(files))
    return 1 if failures else 0


def _classifier(options: argparse.Namespace) -> "Classifier | RemoteClassifier":
    if options.url is None:
        from app.offline import Classifier

        return Classifier(_settings(options), options.model)
    from app.remote import RemoteClassifier

    for name in PREDICT_SETTINGS:
        if hasattr(options, f"setting_{name}"):
            raise BadRequestError(f"{flag_of(name)} is for predictions without a server: leave it out, or --url.")
    return RemoteClassifier(options.url, options.model, os.environ.get(API_KEY_VARIABLE))


def _key(options: argparse.Namespace) -> int:
    from app.keys import append_key, make_key, scopes_of

    file = _settings(options).keys
    key, line = make_key(options.name, scopes_of(options.scopes, f"--scopes {options.scopes}"))
    if file:
        append_key(Path(file), options.name, line)
        print(f"Added to {file}; a service that uses it takes the key within two seconds.", file=sys.stderr)
    else:
        print(f"The line for the key file:\n{line}\nThe key, shown this once:", file=sys.stderr)
    print(key)
    return 0


def _health(options: argparse.Namespace) -> int:
    settings = _settings(options)
    url = settings.local_url(settings.probe_port) + "/readyz"
    if url.startswith("https") and settings.tls_client_ca:
        raise SettingsError("The port asks for a client's certificate: set --probe-port, which does not.")
    # This machine's own address, by which no certificate is found; nothing secret is sent or asked.
    trusting = ssl.create_default_context()
    trusting.check_hostname = False
    trusting.verify_mode = ssl.CERT_NONE
    # A container's HTTP_PROXY is not for this.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusting))
    try:
        answer = _answer_of(direct, url)
    except (OSError, http.client.HTTPException) as error:
        print(f"not ready: {url} does not answer: {error}")
        return 1
    except (ValueError, KeyError, TypeError):
        print(f"not ready: what answers at {url} is not Convoy")
        return 1
    print(answer or "ready")
    return 1 if answer else 0


def _answer_of(opener: urllib.request.OpenerDirector, url: str) -> str:
    """Return why the service at `url` is not ready, or an empty string."""
    try:
        with opener.open(url, timeout=5) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        answer = json.load(error)
    return "" if answer["ready"] else f"not ready: {answer['reason']}"


if __name__ == "__main__":
    sys.exit(main())

"""What Kubernetes and Prometheus ask: is the service alive, does it want traffic, and its numbers.

Answered from the pages alone, so by any process that has them, and for all of them: a worker on the main port, and on
`probe_port` the supervisor, or the one process there is. That port has an accept queue of its own, so that probes are
answered while the main one is full. Knows nothing of models, engines or FastAPI.
"""

import asyncio
import json
import socket
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from app.metrics import CONTENT_TYPE, CONTENT_TYPE_OPENMETRICS, OPENMETRICS, Metrics
from app.pages import LONG_AGO, SILENT_S, Page, WriterState

_JSON = "application/json"
_MAX_HEAD_BYTES = 16_384


class Probes:
    """The three answers, and a small ASGI application of nothing else."""

    def __init__(self, metrics: Metrics, refresh: Callable[[], None] = lambda: None, stuck_s: float = 0.0) -> None:
        """Answer from a service's pages.

        Args:
            metrics: the numbers and their pages.
            refresh: brings this process's own page up to date.
            stuck_s: a batch that runs for longer, seconds, will never end; 0: none is taken for that.
        """
        self._metrics = metrics
        self._refresh = refresh
        self._stuck_s = stuck_s

    def live(self) -> tuple[int, dict[str, Any]]:
        """Return the status of `/livez`, 200 or 503, and its content.

        Of several workers the supervisor replaces one that is stuck: no reason to end the others.
        """
        self._refresh()
        run_s = 0.0 if len(self._metrics.pages) > 1 else self._metrics.page.run_s
        if has_lost_its_device(run_s):
            return 503, {"live": False, "reason": "The GPU has failed, and this process cannot use it any more."}
        if is_stuck(run_s, self._stuck_s):
            return 503, {"live": False, "reason": f"A batch has been running for {run_s:.0f} s: its session is stuck."}
        return 200, {"live": True}

    def ready(self) -> tuple[int, dict[str, Any]]:
        """Return the status of `/readyz`, 200 or 503, and its content.

        One worker that is ready makes the service ready: the others leave new connections to it.
        """
        self._refresh()
        return readiness(self._metrics.pages, self._metrics.engines)

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """Return every series and their format's media type: OpenMetrics for who accepts it, else Prometheus text."""
        self._refresh()
        openmetrics = OPENMETRICS in accept
        return self._metrics.render(openmetrics=openmetrics), CONTENT_TYPE_OPENMETRICS if openmetrics else CONTENT_TYPE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        status, content, kind = 200, b"", _JSON
        if scope["path"] in ("/livez", "/readyz"):
            status, answer = self.live() if scope["path"] == "/livez" else self.ready()
            content = json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
        elif scope["path"] == "/metrics":
            accept = next((value for name, value in scope["headers"] if name == b"accept"), b"")
            content, kind = self.metrics(accept.decode("latin-1"))
        else:
            status = 404
            content = b'{"error": "This port has /livez, /readyz and /metrics.", "code": "not_found"}'
        if status == 200 and scope["method"] not in ("GET", "HEAD"):
            status, kind = 405, _JSON
            content = b'{"error": "This port answers GET.", "code": "method_not_allowed"}'
        headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})


def is_stuck(run_s: float, stuck_s: float) -> bool:
    """Tell whether a session that has been in one run for `run_s` seconds will not come back.

    `stuck_s` 0: never, unless its device is lost.
    """
    return has_lost_its_device(run_s) or 0 < stuck_s < run_s


def has_lost_its_device(run_s: float) -> bool:
    """Tell whether that run is none that can end."""
    return run_s > -LONG_AGO


def readiness(pages: Sequence[Page], engines: Sequence[Page] = ()) -> tuple[int, dict[str, Any]]:
    """Return status and content of `/readyz` from the pages of a service, and of its engines."""
    reasons, models, workers = dict[str, None](), dict[str, str](), dict[str, str]()
    ready = False
    for page in pages:
        if not page.pid:
            continue
        note = page.note
        reason = note.get("reason", "")
        if page.state is WriterState.STARTING:
            reason = "Starting."
        elif page.silent_s > SILENT_S:
            reason = f"Worker {page.number} has not answered for {page.silent_s:.0f} s."
        works = page.state is WriterState.READY and not reason
        ready |= works
        reasons[reason] = None
        workers[str(page.number)] = "ready" if works else reason
        for name, state in note.get("models", {}).items():
            models[name] = max(models.get(name, state), state, key=_trust)
    reason = "" if ready else " ".join(reasons) or "No worker is running."
    content: dict[str, Any] = {"ready": ready, "reason": reason, "models": models}
    # Those who open models know more of it than those who wait for them.
    loading = [page.note.get("loading", "") for page in (engines or pages) if page.pid]
    if any(loading):
        content["loading"] = list(dict.fromkeys(filter(None, loading)))
    if len(pages) > 1:
        content["workers"] = workers
    return 200 if ready else 503, content


def _trust(state: str) -> int:
    """Order what workers say of a model: the service has it when one of them has."""
    return ("unloaded", "unloading", "failed", "loading", "ready").index(state)


class ProbePort:
    """The probes on a socket of their own, on the running loop, for as long as a `with` block runs."""

    def __init__(self, probes: Probes, listener: socket.socket | None) -> None:
        """Serve on `listener`; None: nowhere."""
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                probes,
                http="h11",  # httptools would keep the head of a request however long it is
                h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                date_header=False,
            )
        )

    async def __aenter__(self) -> None:
        if self._listener is None:
            return
        config = self._server.config
        config.load()
        self._server.lifespan = config.lifespan_class(config)
        await self._server.startup(sockets=[self._listener])

    async def __aexit__(self, *_: object) -> None:
        if self._listener is None:
            return
        for server in self._server.servers:
            server.close()
        for connection in self._server.server_state.connections:
            connection.shutdown()
        await asyncio.sleep(0)

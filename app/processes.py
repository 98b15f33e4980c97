"""What each process of the service runs until it is to end: all by itself, one worker's part, or the sessions."""

import asyncio
import logging
import socket
from contextlib import nullcontext

from app import runtime
from app.accept import listen, listen_for_probes, reserve_for_grpc, url_of
from app.board import Board
from app.cluster import engine as cluster
from app.cpus import share_of_cpus
from app.metrics import Metrics
from app.server import Server, SharingServer
from app.service import Service, loader_of
from app.settings import Settings

log = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Serve in this process until a signal; blocks. Returns after what was accepted has been answered.

    Raises:
        SettingsError: no models, no port, or no such device.
        RuntimeMissingError: there is no usable ONNX Runtime.
    """
    service = Service(settings)
    with (
        listen(settings.host, settings.port) as listener,
        listen_for_probes(settings) or nullcontext() as probes,
        reserve_for_grpc(settings),
    ):
        server = Server(service, probes)
        with server.capture_signals():  # from before anybody is told that there is somebody to stop
            server.heed_signals_early()
            log.info("listening", extra={"url": url_of(listener, secure=service.certificate is not None)})
            server.run(sockets=[listener])
    if service.fault is not None:
        raise service.fault


def share(
    settings: Settings,
    listener: socket.socket,
    metrics: Metrics,
    board: Board,
    lifeline: int,
    mailbox: socket.socket,
) -> None:
    """Serve as one of several workers until a signal, or until the supervisor is gone; blocks.

    Args:
        settings: the worker's own: its share of the service's.
        listener: the listening socket, which all workers have.
        metrics: the worker's, over the pages of all.
        board: where all read what operators ask for.
        lifeline: a pipe's end that is closed when the supervisor is gone.
        mailbox: through which it meets engines, if there are any.

    Raises:
        SettingsError: no models, or no such device.
        RuntimeMissingError: there is no usable ONNX Runtime.
    """
    service = Service(settings, metrics, board, mailbox)
    SharingServer(service, listener, lifeline).run(sockets=[])
    if service.fault is not None:
        raise service.fault


def run_models(settings: Settings, metrics: Metrics, lifeline: int, mailbox: socket.socket) -> None:
    """Run models for the workers until SIGTERM, or until the supervisor is gone; blocks.

    Args:
        settings: the service's.
        metrics: this engine's.
        lifeline: a pipe's end that is closed when the supervisor is gone.
        mailbox: through which it meets workers.

    Raises:
        RuntimeMissingError: there is no usable ONNX Runtime.
    """
    runtime.check_wheels(runtime.installed_wheels())
    loader = loader_of(settings, metrics, share_of_cpus(settings.engines))
    asyncio.run(
        cluster.serve(
            metrics,
            loader.load,
            mailbox,
            lifeline,
            device=settings.device,
            threads_per_session=settings.threads_per_session,
            progress=loader.progress,
        )
    )

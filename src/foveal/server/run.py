"""Runs the application on a socket until a signal ends it."""

import logging
import os
import socket
import sys

import uvicorn

from foveal.server.app import create_app
from foveal.server.middleware import JsonLines
from foveal.server.service import Service

_logger = logging.getLogger("foveal.server")
_STOPPED_AT_ONCE = 1
_KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep an idle connection (5 seconds for OpenAI's own): closing one as a client takes it up again
would cost that client an error."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that is ours; nobody can connect before the server runs. Raises ValueError where it cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return server


class _Server(uvicorn.Server):
    """The first SIGTERM or Ctrl-C drains: no new requests, those that are here are finished. A second one stops."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        service.worker.on_death = self._end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """From now on clients can connect."""
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        fields = {"host": host, "port": port, "url": url, "model": self._service.settings.model_name}
        _logger.info("listening", extra={"fields": fields})

    def handle_exit(self, sig: int, frame: object) -> None:
        """A signal has come."""
        if self.should_exit:
            _logger.warning("stopped", extra={"fields": {"unfinished": self._service.worker.unfinished}})
            # A step of the engine cannot be interrupted, and nothing here needs to be put in order.
            os._exit(_STOPPED_AT_ONCE)
        _logger.warning("draining", extra={"fields": {"unfinished": self._service.worker.unfinished}})
        self._service.worker.drain()
        self._end()

    def _end(self) -> None:
        self.should_exit = True


def configuration(service: Service) -> uvicorn.Config:
    """How uvicorn runs the service: it logs no requests, for their paths are the client's words."""
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
    logging.getLogger("uvicorn.access").disabled = True
    return config


def serve(service: Service, server: socket.socket) -> None:
    """Serve on the socket until a signal; log lines, as JSON, go to standard error. SystemExit if the engine failed."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("foveal").setLevel(logging.INFO)
    _Server(configuration(service), service).run(sockets=[server])
    if service.worker.failed:
        sys.exit(1)

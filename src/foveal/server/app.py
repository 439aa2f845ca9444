"""The application: routes, middleware, and the worker that lives as long as they do."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.responses import Response
from fastapi.security import HTTPBearer

import foveal
from foveal.server import chat, completions, errors, status, web
from foveal.server.describe import describe
from foveal.server.middleware import BodyLimit, HeadAsGet, Keys, RequestLog
from foveal.server.service import Service
from foveal.server.stream import ClientGone, gone_response

_BODY_SECONDS = 60.0
"""How long a body may take to arrive."""
_PUBLIC = ("/health", "/ready", "/version", "/metrics", "/openapi.json")


def create_app(service: Service) -> FastAPI:
    """The whole service as an ASGI application; `service` works while the application's lifespan lasts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()

    app = FastAPI(
        title="Foveal",
        version=foveal.__version__,
        lifespan=lifespan,
        # They would load their assets from another host.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    errors.install(app)

    @app.exception_handler(ClientGone)
    async def _gone(*_: object) -> Response:
        return gone_response()

    keys = service.settings.api_keys
    locked = [Depends(HTTPBearer(auto_error=False))] if keys else []  # for /openapi.json; `Keys` is what holds
    for router in (completions.router, chat.router, status.router):
        app.include_router(router, dependencies=locked)
    app.include_router(web.router)
    app.include_router(status.public)
    describe(app)
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, most=service.max_body_bytes, seconds=_BODY_SECONDS)
    app.add_middleware(Keys, keys=keys, public=(*_PUBLIC, *web.PATHS))
    app.add_middleware(RequestLog, metrics=service.metrics)
    return app

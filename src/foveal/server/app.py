"""The application: routes, middleware, and the worker that lives as long as they do."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.responses import Response
from fastapi.security import HTTPBearer

import foveal
from foveal.server import chat, completions, errors, status, web
from foveal.server.middleware import BodyLimit, Keys, RequestLog
from foveal.server.responses import document
from foveal.server.service import Service
from foveal.server.stream import ClientGone, gone_response

_ERRORS = document(
    {
        400: "A parameter is wrong or not supported; `param` names it",
        401: "No valid API key",
        404: "Another model",
        413: "The body is too large",
        429: "Too many requests wait; see Retry-After",
        500: "The server's own mistake",
        503: "The server is shutting down, or its engine has failed",
    }
)
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
        app.include_router(router, responses=_ERRORS, dependencies=locked)
    app.include_router(web.router)
    app.include_router(status.public, responses=document({503: "Not now"}))
    app.add_middleware(BodyLimit, most=service.max_body_bytes)
    app.add_middleware(Keys, keys=keys, public=(*_PUBLIC, *web.PATHS))
    app.add_middleware(RequestLog, metrics=service.metrics)
    return app

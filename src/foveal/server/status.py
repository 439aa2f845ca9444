"""What the server is and how it does: models, health, metrics; and its tokenizer."""

from fastapi import APIRouter
from fastapi.responses import Response

import foveal
from foveal.server.errors import ApiError
from foveal.server.requests import DetokenizeRequest, TokenizeRequest
from foveal.server.responses import Detokenized, Model, Models, Status, Tokens, Version
from foveal.server.service import Service, ServiceOf

router = APIRouter()
public = APIRouter()
"""Routes that need no key."""

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/v1/models")
async def list_models(service: ServiceOf) -> Models:
    """The one model that there is."""
    return Models(data=[_model(service)])


@router.get("/v1/models/{name:path}")
async def get_model(name: str, service: ServiceOf) -> Model:
    """The model by its name."""
    service.check_model(name)
    return _model(service)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: ServiceOf) -> Tokens:
    """The tokens of a text, or of a conversation in the model's template."""
    service.check_model(body.model)
    if body.messages is not None:
        prompt = await service.encode_messages(body.messages)
    else:
        assert body.prompt is not None
        prompt = await service.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    return Tokens(tokens=prompt.ids, count=len(prompt.ids), max_model_len=service.max_model_len)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: ServiceOf) -> Detokenized:
    """The text of tokens, special ones included."""
    service.check_model(body.model)
    return Detokenized(prompt=await service.decode(body.tokens, skip_special_tokens=False))


@public.get("/health")
async def health(service: ServiceOf) -> Status:
    """200 while the engine can compute; 503 once it has failed."""
    if not service.worker.alive:
        raise ApiError(503, "the engine has failed")
    return Status(status="ok")


@public.get("/ready")
async def ready(service: ServiceOf) -> Status:
    """200 while requests are accepted; 503 while the server drains."""
    if not service.worker.ready:
        raise ApiError(503, "the server is shutting down")
    return Status(status="ok")


@public.get("/version")
async def version() -> Version:
    """Foveal's version."""
    return Version(version=foveal.__version__)


@public.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: ServiceOf) -> Response:
    """Figures for Prometheus."""
    return Response(service.metrics.text(), media_type=_METRICS_TYPE)


def _model(service: Service) -> Model:
    return Model(
        id=service.settings.model_name,
        created=service.created,
        max_model_len=service.max_model_len,
        chat=service.chats,
    )

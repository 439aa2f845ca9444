"""`/v1/chat/completions`."""

import time
from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from foveal.engine import RequestOutput
from foveal.server.progress import Piece, Progress, likeliest
from foveal.server.requests import ChatRequest
from foveal.server.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from foveal.server.service import Service, ServiceOf, usage_of
from foveal.server.stream import EventStream, example, results, whole
from foveal.server.worker import Job

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None, responses={200: example(ChatCompletion)})
async def create_chat_completion(http: HttpRequest, body: ChatRequest, service: ServiceOf) -> Response:
    """Answer a conversation."""
    service.check_model(body.model)
    prompt = await service.encode_chat(body.messages)
    job = await service.submit(
        http, body, [prompt], max_tokens=body.limit, logprobs=(body.top_logprobs or 0) if body.logprobs else None
    )
    answer = _Answer(service, body, job)
    if body.stream:
        return EventStream(job, answer.events())
    return whole(answer.at_once(await results(http, job)))


class _Answer:
    """Puts the engine's outputs into OpenAI's shape."""

    def __init__(self, service: Service, body: ChatRequest, job: Job) -> None:
        self._service = service
        self._body = body
        self._job = job
        self._id = f"chatcmpl-{job.requests[0].id}"
        self._created = int(time.time())
        self._progress = Progress([request.id for request in job.requests], body.completions)

    async def events(self) -> AsyncIterator[ChatChunk]:
        """One for each completion that has something new, and the usage at the end."""
        async for output in self._job.updates():
            for piece in self._progress.pieces(output):
                yield self._chunk([self._delta(piece)])
        if self._body.usage_wanted:
            yield self._chunk([], usage_of([output]))

    def at_once(self, outputs: Sequence[RequestOutput]) -> ChatCompletion:
        """All of it."""
        choices = [self._choice(piece) for output in outputs for piece in self._progress.pieces(output)]
        return ChatCompletion(
            id=self._id, created=self._created, model=self._body.model, choices=choices, usage=usage_of(outputs)
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._body.model, choices=choices, usage=usage)

    def _delta(self, piece: Piece) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=piece.index,
            delta=ChatDelta(role="assistant" if piece.first else None, content=piece.text),
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish_reason,
        )

    def _choice(self, piece: Piece) -> ChatChoice:
        return ChatChoice(
            index=piece.index,
            message=ChatMessage(content=piece.text),
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        content = []
        for token, entry in zip(piece.token_ids, piece.logprobs, strict=True):
            top = [self._top(other, one.logprob) for other, one in likeliest(entry, self._body.top_logprobs or 0)]
            own = self._top(token, entry[token].logprob)
            content.append(TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
        return ChatLogprobs(content=content)

    def _top(self, token: int, logprob: float) -> TopLogprob:
        data = self._service.token_bytes(token)
        return TopLogprob(token=data.decode("utf-8", "replace"), logprob=logprob, bytes=list(data))

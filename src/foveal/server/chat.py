"""`/v1/chat/completions`."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from foveal.engine import RequestOutput
from foveal.server.conversation import Turn
from foveal.server.look import RequestLook
from foveal.server.progress import Looks, Piece, Progress, likeliest
from foveal.server.requests import ChatRequest
from foveal.server.responses import (
    Call,
    CallDelta,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from foveal.server.service import Prompt, Service, ServiceOf, usage_of
from foveal.server.stream import EventStream, example, results, whole
from foveal.server.tools import ToolCall
from foveal.server.worker import Job

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None, responses={200: example(ChatCompletion, ChatChunk)})
async def create_chat_completion(http: HttpRequest, body: ChatRequest, service: ServiceOf) -> Response:
    """Answer a conversation."""
    service.check_model(body.model)
    turn = await service.next_turn(body)
    job = await service.submit(
        http,
        body,
        [Prompt(turn.prompt_ids, turn.text)],
        max_tokens=body.limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        guidance=turn.guidance,
    )
    answer = _Answer(service, body, job, turn)
    if body.stream:
        return EventStream(job, answer.events())
    return whole(answer.at_once(await results(http, job)))


class _Answer:
    """Puts the engine's outputs into OpenAI's shape."""

    def __init__(self, service: Service, body: ChatRequest, job: Job, turn: Turn) -> None:
        self._service = service
        self._body = body
        self._job = job
        self._id = f"chatcmpl-{job.requests[0].id}"
        self._created = int(time.time())
        self._progress = Progress([request.id for request in job.requests], body.completions)
        self._looks = Looks(service.looks, wanted=body.looks, completions=body.completions)
        self._readers = [turn.reader() for _ in range(body.completions)]

    async def events(self) -> AsyncIterator[ChatChunk]:
        """One for each completion that has something new, and the usage at the end."""
        async for output in self._job.updates():
            usage = usage_of([output]) if self._body.usage_always else None
            for piece in self._progress.pieces(output):
                if choice := self._delta(piece):
                    yield self._chunk([choice], usage, self._looks.once(output))
        if self._body.usage_wanted:
            yield self._chunk([], usage_of([output]))

    def at_once(self, outputs: Sequence[RequestOutput]) -> ChatCompletion:
        """All of it."""
        choices = [self._choice(piece) for output in outputs for piece in self._progress.pieces(output)]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._body.model,
            choices=choices,
            usage=usage_of(outputs),
            foveal=self._looks.once(outputs[0]),
        )

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | None = None, look: RequestLook | None = None
    ) -> ChatChunk:
        return ChatChunk(
            id=self._id, created=self._created, model=self._body.model, choices=choices, usage=usage, foveal=look
        )

    def _delta(self, piece: Piece) -> ChatChunkChoice | None:
        """None where all of the piece is held back."""
        reader = self._readers[piece.index]
        before = reader.called
        part = reader.read(piece.text, last=piece.finish_reason is not None)
        calls = [CallDelta(**_call(call), index=index) for index, call in enumerate(part.calls, before)]
        said = part.content or part.reasoning or calls
        if not (said or piece.first or piece.finish_reason or piece.logprobs or piece.selection):
            return None
        return ChatChunkChoice(
            index=piece.index,
            delta=ChatDelta(
                role="assistant" if piece.first else None,
                content=part.content if part.content or not said else None,
                reasoning_content=part.reasoning or None,
                tool_calls=calls or None,
            ),
            logprobs=self._logprobs(piece),
            foveal=self._looks.of(piece),
            finish_reason=self._reason(piece),
        )

    def _choice(self, piece: Piece) -> ChatChoice:
        part = self._readers[piece.index].read(piece.text, last=True)
        return ChatChoice(
            index=piece.index,
            message=ChatMessage(
                content=None if part.calls and not part.content else part.content,
                reasoning_content=part.reasoning or None,
                tool_calls=[Call(**_call(call)) for call in part.calls] or None,
            ),
            logprobs=self._logprobs(piece),
            foveal=self._looks.of(piece),
            finish_reason=self._reason(piece),
            stop_reason=piece.stop_reason,
        )

    def _reason(self, piece: Piece) -> ChatFinishReason | None:
        called = piece.finish_reason == "stop" and self._readers[piece.index].called
        return "tool_calls" if called else piece.finish_reason

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


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex}", "function": FunctionCall(name=call.name, arguments=call.arguments)}

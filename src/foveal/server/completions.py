"""`/v1/completions`."""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from foveal.engine import RequestOutput
from foveal.engine.outputs import Logprobs
from foveal.server.look import RequestLook
from foveal.server.progress import Looks, Offsets, Piece, Progress, likeliest
from foveal.server.requests import CompletionRequest
from foveal.server.responses import Completion, CompletionChoice, CompletionLogprobs, PromptLogprob, Usage
from foveal.server.service import Prompt, Service, ServiceOf, usage_of
from foveal.server.stream import EventStream, example, results, whole
from foveal.server.worker import Job

router = APIRouter()


@router.post("/v1/completions", response_model=None, responses={200: example(Completion, Completion)})
async def create_completion(http: HttpRequest, body: CompletionRequest, service: ServiceOf) -> Response:
    """Continue one prompt or several."""
    service.check_model(body.model)
    prompts = [await _prompt(service, body, prompt) for prompt in body.prompts()]
    wanted = [count for count in (body.prompt_logprobs, body.logprobs if body.echo else None) if count is not None]
    job = await service.submit(
        http,
        body,
        prompts,
        max_tokens=body.limit or 1,
        logprobs=body.logprobs,
        prompt_logprobs=max(wanted, default=None),
        guidance=body.guidance(),
    )
    answer = _Answer(service, body, prompts, job)
    if body.stream:
        return EventStream(job, answer.events())
    return whole(answer.at_once(await results(http, job)))


async def _prompt(service: Service, body: CompletionRequest, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        return await service.encode(prompt, add_special_tokens=body.add_special_tokens is not False)
    return Prompt(prompt, await service.decode(prompt, skip_special_tokens=True) if body.echo else None)


class _Answer:
    """Puts the engine's outputs into OpenAI's shape."""

    def __init__(self, service: Service, body: CompletionRequest, prompts: Sequence[Prompt], job: Job) -> None:
        self._service = service
        self._body = body
        self._prompts = prompts
        self._job = job
        self._id = f"cmpl-{job.requests[0].id}"
        self._created = int(time.time())
        self._progress = Progress([request.id for request in job.requests], body.completions)
        skipped = [self._skipped(prompt) if body.echo else 0 for prompt in prompts]
        self._offsets = [Offsets(count) for count in skipped for _ in range(body.completions)]
        self._looks = Looks(service.looks, wanted=body.looks, completions=len(self._offsets))
        self._hidden = int(body.limit == 0)

    async def events(self) -> AsyncIterator[Completion]:
        """One for each completion that has something new, and the usage at the end."""
        latest: dict[str, RequestOutput] = {}
        async for output in self._job.updates():
            latest[output.request_id] = output
            usage = self._usage(list(latest.values())) if self._body.usage_always else None
            for choice in self._choices(output):
                yield self._completion([choice], usage, self._looks.once(output))
        if self._body.usage_wanted:
            yield self._completion([], self._usage(list(latest.values())))

    def at_once(self, outputs: Sequence[RequestOutput]) -> Completion:
        """All of it."""
        choices = [choice for output in outputs for choice in self._choices(output)]
        return self._completion(choices, self._usage(outputs), self._looks.once(outputs[0]))

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | None = None, look: RequestLook | None = None
    ) -> Completion:
        return Completion(
            id=self._id, created=self._created, model=self._body.model, choices=choices, usage=usage, foveal=look
        )

    def _usage(self, outputs: Sequence[RequestOutput]) -> Usage:
        return usage_of(outputs, hidden=self._hidden)

    def _choices(self, output: RequestOutput) -> Iterator[CompletionChoice]:
        for piece in self._progress.pieces(output):
            if self._hidden:  # one token had to be computed; it was not asked for
                piece = replace(
                    piece, text="", token_ids=[], logprobs=[], selection=[], finish_reason="length", stop_reason=None
                )
            yield self._choice(piece)

    def _choice(self, piece: Piece) -> CompletionChoice:
        echoed = self._body.echo and piece.first
        prompt = self._prompts[piece.index // self._body.completions]
        return CompletionChoice(
            index=piece.index,
            text=(prompt.text or "") + piece.text if echoed else piece.text,
            logprobs=self._logprobs(piece) if self._body.logprobs is not None else None,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            foveal=self._looks.of(piece),
            prompt_logprobs=self._prompt_logprobs(piece) if piece.first else None,
        )

    def _logprobs(self, piece: Piece) -> CompletionLogprobs:
        tokens, entries = piece.token_ids, list[Logprobs | None](piece.logprobs)
        if self._body.echo and piece.first:
            tokens = piece.output.prompt_token_ids + tokens
            entries = (piece.output.prompt_logprobs or []) + entries
        offsets = self._offsets[piece.index]
        return CompletionLogprobs(
            tokens=[self._text(token) for token in tokens],
            token_logprobs=[
                None if entry is None else entry[token].logprob for token, entry in zip(tokens, entries, strict=True)
            ],
            top_logprobs=[None if entry is None else self._top(entry) for entry in entries],
            text_offset=[offsets.add(self._visible(token)) for token in tokens],
        )

    def _top(self, entry: Logprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in likeliest(entry, self._body.logprobs or 0):
            top.setdefault(self._text(token), logprob.logprob)
        return top

    def _prompt_logprobs(self, piece: Piece) -> list[dict[str, PromptLogprob] | None] | None:
        count = self._body.prompt_logprobs
        if count is None:
            return None
        ids, entries = piece.output.prompt_token_ids, piece.output.prompt_logprobs or []
        return [
            None
            if entry is None
            else {str(token): self._one(token, entry) for token in {**dict(likeliest(entry, count)), own: None}}
            for own, entry in zip(ids, entries, strict=True)
        ]

    def _one(self, token: int, entry: Logprobs) -> PromptLogprob:
        return PromptLogprob(logprob=entry[token].logprob, rank=entry[token].rank, decoded_token=self._text(token))

    def _skipped(self, prompt: Prompt) -> int:
        visible = b"".join(self._visible(token) for token in prompt.ids[:2])
        return int(visible.startswith(b" ") and not (prompt.text or "").startswith(" "))

    def _text(self, token: int) -> str:
        return self._service.token_bytes(token).decode("utf-8", "replace")

    def _visible(self, token: int) -> bytes:
        """What the token adds to the text: special ones add nothing."""
        return b"" if token in self._service.special_ids else self._service.token_bytes(token)

"""What all endpoints share: one model, its worker and its tokenizer."""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import cache as cached
from functools import partial
from typing import Annotated, Any, TypeVar

import jinja2
from fastapi import Depends
from fastapi import Request as HttpRequest

from foveal.engine import LLM, Request, RequestOutput
from foveal.models.tokenizer import token_bytes
from foveal.server.conversation import Turn, next_turn, template_prompt
from foveal.server.errors import ApiError, bad_value
from foveal.server.look import LookSource
from foveal.server.metrics import Metrics
from foveal.server.requests import Body, ChatRequest, Message, Sampling
from foveal.server.responses import PromptTokensDetails, Usage
from foveal.server.worker import Job, Worker

_Result = TypeVar("_Result")

_LEAST_BODY_BYTES = 4 * 2**20
_BODY_BYTES_PER_TOKEN = 64
"""What a token of a prompt may take in a body, generously."""
_LONG_TEXT = 2**16
"""Characters above which a text is tokenized beside the others, not before them."""


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens, with its text where that is known."""

    ids: list[int]
    text: str | None


@dataclass(frozen=True)
class Settings:
    """`model_name`: what clients call the model. `api_keys`: any of them opens the server; none: it is open.
    `max_num_seqs` completions run at a time and `max_queued_requests` more may wait."""

    model_name: str
    api_keys: tuple[str, ...] = ()
    max_num_seqs: int = 64
    max_queued_requests: int = 256


class Service:
    """One model behind HTTP. `llm` must be used by nobody else."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.worker = Worker(
            llm.engine, max_sequences=settings.max_num_seqs + settings.max_queued_requests, observer=self.metrics
        )
        self.metrics.watch(lambda: self.worker.state)
        self.created = int(time.time())
        assert llm.tokenizer is not None, "a server needs a tokenizer"
        self._tokenizer = llm.tokenizer
        self.token_bytes = token_bytes(self._tokenizer)
        self.special_ids = frozenset(self._tokenizer.all_special_ids)
        self.looks = LookSource(llm.layer_sights, self.token_bytes, self.special_ids, llm.cache_bytes)
        self._engine = llm.engine
        # Never in the event loop; and a book takes seconds, for which others must not wait.
        self._lane = _Lane(lambda: self._tokenizer)
        self._slow_lane = _Lane(self._lane.copied)

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its completion together."""
        return self._engine.longest

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self._tokenizer.chat_template)

    @property
    def max_body_bytes(self) -> int:
        """Longer bodies are refused: no prompt that fits needs them."""
        return max(_LEAST_BODY_BYTES, _BODY_BYTES_PER_TOKEN * self.max_model_len)

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for any other model."""
        if name is not None and name != self.settings.model_name:
            raise ApiError(404, f"there is no model {ascii(name)[:200]} here", param="model", code="model_not_found")

    async def encode(self, prompt: str, *, add_special_tokens: bool) -> Prompt:
        """A prompt from text. Raises ApiError 400 for text that is no Unicode."""
        return await self._in_thread("prompt", partial(_encode, prompt, add_special_tokens), size=len(prompt))

    async def encode_messages(self, messages: list[Message]) -> Prompt:
        """A prompt from a conversation, by the model's template. Raises ApiError 400 where the template refuses it."""
        prompt = await self._in_thread(
            "messages", lambda tokenizer: template_prompt(tokenizer, messages, {}), size=_size(messages)
        )
        return Prompt(prompt["prompt_token_ids"], prompt["prompt"])

    async def next_turn(self, body: ChatRequest) -> Turn:
        """What a conversation asks of the model. Raises ApiError 400 for what it cannot do."""
        return await self._in_thread(
            "messages", lambda tokenizer: next_turn(tokenizer, body), body, size=_size(body.messages)
        )

    async def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of tokens. Raises ApiError 400 for one that the tokenizer does not know."""
        most = len(self._tokenizer)
        if unknown := [token for token in tokens if token >= most]:
            raise ApiError(400, f"tokens has {unknown[0]}, which is not among {most} tokens", param="tokens")
        return await self._in_thread(
            "tokens", lambda tokenizer: str(tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))
        )

    async def submit(self, http: HttpRequest, body: Sampling, prompts: Sequence[Prompt], **params: Any) -> Job:
        """Hand the prompts to the engine, with the body's parameters and `params`. The caller closes the job.

        Raises ApiError: 400 where the engine would refuse one of them, 429 and 503 as `Worker.submit`.
        """
        tenant = getattr(http.state, "tenant", 0)
        salt = f"{tenant}" if body.cache_salt is None else f"{tenant} {body.cache_salt}"

        def checked(_: Any) -> list[Request]:
            sampling = body.sampling_params(**params)
            requests = [Request(uuid.uuid4().hex, prompt.ids, sampling, cache_salt=salt) for prompt in prompts]
            for request in requests:
                self._engine.check(request)
                self._check_length(request, body)
            return requests

        try:
            # Not in the event loop: a grammar may take a second to compile.
            requests = await self._lane.run(checked)
        except ValueError as error:
            raise bad_value(error, list(type(body).model_fields), names={"prompt": body.prompt_name}) from None
        http.state.log |= {"prompt_tokens": sum(len(prompt.ids) for prompt in prompts)}
        http.state.log |= {} if body.user is None else {"user": body.user}
        return self.worker.submit(requests, stream=bool(body.stream))

    def _check_length(self, request: Request, body: Sampling) -> None:
        prompt, params = request.prompt_length, request.params
        completion = params.max_tokens or max(1, params.min_tokens)
        if prompt + completion > self.max_model_len:
            param = body.length_name if completion > 1 and prompt < self.max_model_len else body.prompt_name
            asked = f"{param}: {prompt} tokens of the prompt and {completion} to follow"
            room = f"the {self.max_model_len} that the model and its cache have room for"
            raise ApiError(400, f"{asked} are more than {room}", param=param, code="context_length_exceeded")

    async def _in_thread(
        self, param: str, call: Callable[[Any], _Result], body: Body | None = None, size: int = 0
    ) -> _Result:
        """What `call` gives for the tokenizer, which has to read `size` characters. Its errors are the client's: of a
        field of `body`, if they name one first, else of `param`."""
        try:
            return await (self._slow_lane if size > _LONG_TEXT else self._lane).run(call)
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            # A template's own refusal, no template at all, tools that are none, or text that is no Unicode.
            known = [param] if body is None else list(type(body).model_fields)
            raise bad_value(error, known, otherwise=param) from None


class _Lane:
    """A tokenizer and the only thread that uses it: they are not made for several."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="foveal-tokenizer")
        self._tokenizer = cached(make)

    async def run(self, call: Callable[[Any], _Result]) -> _Result:
        """What `call` gives for the tokenizer, after the calls before it."""

        def checked() -> _Result:
            try:
                return call(self._tokenizer())
            except Exception:
                raise
            except BaseException as panic:  # of a package written in Rust, which is no Exception
                raise RuntimeError(f"{type(panic).__name__} in the tokenizer's thread") from panic

        return await asyncio.get_running_loop().run_in_executor(self._thread, checked)

    def copied(self) -> Any:
        """A copy of the tokenizer, made when this lane does not use it."""
        return self._thread.submit(lambda: deepcopy(self._tokenizer())).result()


def _encode(text: str, add_special_tokens: bool, tokenizer: Any) -> Prompt:
    return Prompt(list(tokenizer.encode(text, add_special_tokens=add_special_tokens)), text)


def _size(messages: Sequence[Message]) -> int:
    return sum(message.size for message in messages)


def usage_of(outputs: Sequence[RequestOutput], *, hidden: int = 0) -> Usage:
    """Of all prompts of a request together; `hidden` tokens of each completion were not asked for."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(choice.token_ids) - hidden for output in outputs for choice in output.outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def _service(http: HttpRequest) -> Service:
    found: Service = http.app.state.service
    return found


ServiceOf = Annotated[Service, Depends(_service)]

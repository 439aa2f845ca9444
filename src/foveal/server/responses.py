"""What clients get, in OpenAI's shapes."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from foveal.server.look import ChoiceLook, RequestLook

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


def _if_any() -> Any:
    """A field that is left out where there is nothing to say: most clients have not asked for it."""
    return Field(None, exclude_if=lambda value: value is None)


class ErrorDetail(BaseModel):
    """What is wrong, and with which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """`cached_tokens`: how many of the prompt's the prefix cache had."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of one request; those of a prompt count once, however many completions it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """Lists with an entry a token; the prompt's first token has none, so it is null there. Offsets are in characters
    from the beginning of the choice's whole text. Of two tokens with the same text `top_logprobs` has the likelier."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    foveal: ChoiceLook | None = _if_any()
    prompt_logprobs: list[dict[str, "PromptLogprob"] | None] | None = _if_any()


class PromptLogprob(BaseModel):
    """Of one token at one place of the prompt, under its id."""

    logprob: float
    rank: int
    decoded_token: str


class Completion(BaseModel):
    """`/v1/completions`, whole or one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None
    foveal: RequestLook | None = _if_any()


class TopLogprob(BaseModel):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token at a place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """An entry for every token of the answer."""

    content: list[TokenLogprob]


class FunctionCall(BaseModel):
    """A function and its arguments, the text of a JSON object."""

    name: str
    arguments: str


class Call(BaseModel):
    """A call that the model makes."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class CallDelta(Call):
    """A call in a stream: always whole."""

    index: int


class ChatMessage(BaseModel):
    """The model's answer; what it thought before it, if its template has that."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = _if_any()
    tool_calls: list[Call] | None = _if_any()


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: int | str | None
    foveal: ChoiceLook | None = _if_any()


class ChatCompletion(BaseModel):
    """`/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    foveal: RequestLook | None = _if_any()


class ChatDelta(BaseModel):
    """What is new of an answer."""

    role: Literal["assistant"] | None = _if_any()
    content: str | None = None
    reasoning_content: str | None = _if_any()
    tool_calls: list[CallDelta] | None = _if_any()


class ChatChunkChoice(BaseModel):
    """What is new of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    foveal: ChoiceLook | None = _if_any()


class ChatChunk(BaseModel):
    """One event of the stream of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None
    foveal: RequestLook | None = _if_any()


class Model(BaseModel):
    """`max_model_len`: most tokens of a prompt and its completion together. `chat`: whether it has a chat template,
    without which it only continues texts."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["foveal"] = "foveal"
    max_model_len: int
    chat: bool


class Models(BaseModel):
    """`/v1/models`: there is one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(BaseModel):
    """`/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(BaseModel):
    """`/detokenize`."""

    prompt: str


class Status(BaseModel):
    """`/health` and `/ready`."""

    status: Literal["ok"]


class Version(BaseModel):
    """`/version`."""

    version: str

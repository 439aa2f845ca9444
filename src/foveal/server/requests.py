"""What clients may ask, as pydantic models: OpenAI's parameters, then those of `SamplingParams` that OpenAI has not.

Types are strict and names that are not here are refused. A parameter of OpenAI's that is here only with its neutral
value (`suffix: None`) says that nothing else is supported. `None` always means the default.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from foveal.engine import SamplingParams

_INT64 = 2**63
MOST_LOGPROBS = 20
"""Most likeliest tokens that a client may have the log probabilities of."""

Text = str
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]


class Body(BaseModel):
    """A request body: strict types, no unknown names."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """`include_usage`: one more event before the end, with the usage of the whole request."""

    include_usage: bool = False


class Sampling(Body):
    """What `/v1/completions` and `/v1/chat/completions` have in common."""

    model: str
    n: int | None = Field(None, ge=1, le=128, description="Completions of each prompt; default 1.")
    temperature: FiniteFloat | None = Field(None, ge=0.0, le=2.0, description="Default 1.")
    top_p: FiniteFloat | None = Field(None, gt=0.0, le=1.0, description="Default 1.")
    presence_penalty: FiniteFloat | None = Field(None, ge=-2.0, le=2.0, description="Default 0.")
    frequency_penalty: FiniteFloat | None = Field(None, ge=-2.0, le=2.0, description="Default 0.")
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[FiniteFloat, Field(ge=-100, le=100)]] | None
    ) = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="Repeats the request, alone and in any batch.")
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
        | None
    ) = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="Stands in the server's log beside the request's id.")

    top_k: int | None = Field(None, ge=-1, description="Sample from this many likeliest tokens; 0 or -1: from all.")
    min_p: FiniteFloat | None = Field(None, ge=0.0, le=1.0, description="Default 0.")
    repetition_penalty: FiniteFloat | None = Field(None, gt=0.0, description="Default 1.")
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = Field(None, description="Go on after the end-of-sequence token.")
    min_tokens: int | None = Field(None, ge=0, description="Nothing ends the text before this many tokens.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=256, description="Only requests with the same salt share cached prefixes."
    )

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream = true")
        return self

    @property
    def completions(self) -> int:
        """`n`, by default 1."""
        return self.n or 1

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, **more: Any) -> SamplingParams:
        """As the engine takes them. Raises ValueError where they do not go together."""
        same_name = (
            *("n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "top_k", "min_p"),
            *("repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens"),
        )
        given = {name: value for name in same_name if (value := getattr(self, name)) is not None}
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        return SamplingParams(**given, logit_bias=bias or None, **more)


class CompletionRequest(Sampling):
    """`/v1/completions`."""

    prompt: Text | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(16, ge=0, description="0 only with echo: nothing but the prompt.")
    echo: bool | None = Field(False, description="Begin with the prompt, with its log probabilities if asked for.")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="As `logprobs`, of the prompt.")
    add_special_tokens: bool = Field(True, description="Whether a prompt in text gets the tokenizer's begin token.")
    best_of: Literal[1] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _nothing_needs_echo(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 needs echo = true")
        if self.max_tokens == 0 and self.min_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens} is more than max_tokens = 0")
        return self

    def prompts(self) -> Sequence[str | list[int]]:
        """One or more, as text or token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[list-item, return-value]


class TextPart(Body):
    """A piece of a message's content. Only text is supported."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


class Message(Body):
    """A message to the model. `developer` is the newer name of `system`, and templates see it as that."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates know messages."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatRequest(Sampling):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, description="Default: as many as fit.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say different things")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(Body):
    """`/tokenize`: `prompt`, or `messages` as the chat endpoint would put them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool = Field(True, description="For `prompt` only: templates write their own.")

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self


class DetokenizeRequest(Body):
    """`/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]

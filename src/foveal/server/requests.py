"""What clients may ask, as pydantic models: OpenAI's parameters, then those of `SamplingParams` that OpenAI has not.

Types are strict and names that are not here are refused. A parameter of OpenAI's that is not supported is
`Unsupported`: clients may send it as null. `None` always means the default.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from foveal.engine import Guidance, SamplingParams
from foveal.engine.params import LEAST_PENALTY, MOST_PENALTY
from foveal.server.look import FovealOptions

_INT64 = 2**63
MOST_LOGPROBS = 20
"""Most likeliest tokens that a client may have the log probabilities of."""

_COMPLETION_TOKENS = 16
"""Of `/v1/completions`, where the client does not say; OpenAI's default."""

Unsupported = Annotated[None, Field(description="Not supported: only null.")]
Text = str
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]


class Body(BaseModel):
    """A request body: strict types, no unknown names."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """Usage in a stream."""

    include_usage: bool | None = Field(
        None, description="One more event before the end, with the usage of the whole request."
    )
    continuous_usage_stats: bool | None = Field(None, description="Every event has the usage so far.")
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    """A schema with a name; `strict` or not, the text is held to it."""

    name: str = Field(max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """What the text must be: anything, any JSON object, or JSON that a schema allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is there if, and only if, type is json_schema")
        return self

    def guidance(self) -> Guidance | None:
        """As the engine takes it."""
        if self.json_schema is not None:
            return Guidance(json_schema=self.json_schema.schema_)
        return Guidance(json_object=True) if self.type == "json_object" else None


class StructuredOutputs(Body):
    """Other forms of the text: a regular expression (Rust's syntax), or a grammar in llguidance's Lark. One of them."""

    regex: str | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "StructuredOutputs":
        if (self.regex is None) == (self.grammar is None):
            raise ValueError("regex or grammar must be there, and not both")
        return self

    def guidance(self) -> Guidance:
        """As the engine takes it."""
        return Guidance(regex=self.regex, grammar=self.grammar)


class Sampling(Body):
    """What `/v1/completions` and `/v1/chat/completions` have in common."""

    model: str
    n: int | None = Field(None, ge=1, le=128, description="Completions of each prompt; default 1.")
    temperature: FiniteFloat | None = Field(None, ge=0.0, le=2.0, description="Default 1.")
    top_p: FiniteFloat | None = Field(None, gt=0.0, le=1.0, description="Default 1.")
    presence_penalty: FiniteFloat | None = Field(None, ge=-2.0, le=2.0, description="Default 0.")
    frequency_penalty: FiniteFloat | None = Field(None, ge=-2.0, le=2.0, description="Default 0.")
    logit_bias: dict[TokenKey, Annotated[FiniteFloat, Field(ge=-100, le=100)]] | None = None
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
    repetition_penalty: FiniteFloat | None = Field(None, ge=LEAST_PENALTY, le=MOST_PENALTY, description="Default 1.")
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = Field(None, description="Go on after the end-of-sequence token.")
    min_tokens: int | None = Field(None, ge=0, description="Nothing ends the text before this many tokens.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=256, description="Only requests with the same salt share cached prefixes."
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    foveal: FovealOptions | None = Field(None, description="What only Foveal has; see docs/serving.md.")

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream = true")
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("structured_outputs and response_format exclude each other")
        return self

    @property
    def prompt_name(self) -> str:
        """The field that has the prompt."""
        return "prompt"

    @property
    def length_name(self) -> str:
        """The field that says how long a completion is."""
        return "max_tokens"

    @property
    def completions(self) -> int:
        """`n`, by default 1."""
        return self.n or 1

    @property
    def looks(self) -> bool:
        """Whether the client wants to know what was attended to."""
        return self.foveal is not None and bool(self.foveal.selection)

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_always(self) -> bool:
        """Whether every event has the usage so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def guidance(self) -> Guidance | None:
        """The form of the text that was asked for."""
        form = self.response_format or self.structured_outputs
        return None if form is None else form.guidance()

    def sampling_params(self, **more: Any) -> SamplingParams:
        """As the engine takes them. Raises ValueError where they do not go together."""
        same_name = (
            *("n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "top_k", "min_p"),
            *("repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens"),
        )
        given = {name: value for name in same_name if (value := getattr(self, name)) is not None}
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        return SamplingParams(**given, logit_bias=bias or None, selection=self.looks, **more)


class CompletionRequest(Sampling):
    """`/v1/completions`."""

    prompt: Text | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(
        None, ge=0, description=f"Default {_COMPLETION_TOKENS}; 0 only with echo: nothing but the prompt."
    )
    echo: bool | None = Field(False, description="Begin with the prompt, with its log probabilities if asked for.")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="As `logprobs`, of the prompt.")
    add_special_tokens: bool | None = Field(
        None, description="Whether a prompt in text gets the tokenizer's begin token; default true."
    )
    best_of: Literal[1] | None = None
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _goes_together(self) -> "CompletionRequest":
        if self.looks and len(self.prompts()) > 1:
            raise ValueError("foveal.selection takes one prompt at a time")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 needs echo = true")
        if self.max_tokens == 0 and self.min_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens} is more than max_tokens = 0")
        return self

    @property
    def limit(self) -> int:
        """Most tokens of a completion; 0: nothing but the prompt."""
        return _COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self) -> Sequence[str | list[int]]:
        """One or more, as text or token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[list-item, return-value]


class TextPart(Body):
    """A piece of a message's content. Only text is supported."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


class CalledFunction(Body):
    """A function's name and its arguments, the text of a JSON object."""

    name: str
    arguments: str

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> "CalledFunction":
        try:
            good = isinstance(json.loads(self.arguments), dict)
        except (ValueError, RecursionError):
            good = False
        if not good:
            raise ValueError("arguments must be the text of a JSON object")
        return self


class MadeCall(Body):
    """A call that the model has made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """A message to the model. `developer` is the newer name of `system`, and templates see it as that."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[MadeCall] | None = Field(None, description="Of the assistant.")
    tool_call_id: str | None = Field(None, description="Of a tool: which call this answers.")
    reasoning_content: str | None = Field(None, description="Of the assistant, as the server has returned it.")
    # Clients send the assistant's messages back as they came.
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None

    @model_validator(mode="after")
    def _fits_the_role(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"content is missing in a message of the role {self.role}")
        for name in ("tool_calls", "reasoning_content"):
            if getattr(self, name) and self.role != "assistant":
                raise ValueError(f"{name} cannot be in a message of the role {self.role}")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError(f"tool_call_id and the role {self.role} do not go together")
        return self

    @property
    def size(self) -> int:
        """Characters of its content."""
        return (
            len(self.content) if isinstance(self.content, str) else sum(len(part.text) for part in self.content or ())
        )

    def for_template(self, *, arguments_as_text: bool) -> dict[str, Any]:
        """As chat templates know messages; some want the arguments of calls as text, most as an object."""
        parts = self.content if isinstance(self.content, list) else []
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "".join(part.text for part in parts) if parts else self.content or "",
        }
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
            for call in [] if arguments_as_text else message["tool_calls"]:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        return message


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Hold the arguments to the schema even if the call is not forced.")


class Tool(Body):
    """A tool is a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """Of `tools`."""

    name: str


class NamedTool(Body):
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, description="Default: as many as fit.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="Whether several calls may be made; default true.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the model's chat template, such as enable_thinking."
    )
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    metadata: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_key: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    safety_identifier: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _goes_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say different things")
        if self.guidance() is not None and self.tools and self.tool_choice != "none":
            raise ValueError("response_format cannot be kept where tools may be called: set tool_choice = 'none'")
        return self

    @property
    def prompt_name(self) -> str:
        """The field that has the prompt."""
        return "messages"

    @property
    def length_name(self) -> str:
        """The field that says how long an answer is."""
        names = ("max_completion_tokens", "max_tokens")
        return next((name for name in names if getattr(self, name) is not None), "min_tokens")

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(Body):
    """`/tokenize`: `prompt`, or `messages` as the chat endpoint would put them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(None, description="Default true. For `prompt`: templates write their own.")

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages must be there, and not both")
        return self


class DetokenizeRequest(Body):
    """`/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]

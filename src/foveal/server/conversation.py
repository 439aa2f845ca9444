"""What lies between a conversation and a completion: the prompt and the form of the answer; then reasoning and calls,
read from its text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveal.engine import Guidance
from foveal.engine.llm import chat_prompt, chat_text
from foveal.server.markup import added_markers
from foveal.server.reasoning import ReasoningSplitter, after_reasoning, opens_reasoning, reasons
from foveal.server.requests import ChatRequest, Message
from foveal.server.tools import ToolCall, ToolFormat, ToolParser, plan_tools, tool_format


@dataclass(frozen=True)
class Turn:
    """The model's next turn in a conversation."""

    prompt_ids: list[int]
    text: str
    guidance: Guidance | None
    calls: ToolFormat | None
    """How calls are read from the answer; None: they are not."""
    reasons: bool
    """Whether there may be reasoning before the answer."""

    def reader(self) -> "TurnReader":
        """For one answer."""
        return TurnReader(self)


@dataclass(frozen=True)
class Part:
    """What a piece of text adds to an answer."""

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]


class TurnReader:
    """Parts an answer's text, which comes in pieces, into reasoning, content and calls."""

    def __init__(self, turn: Turn) -> None:
        self._splitter = ReasoningSplitter(inside=opens_reasoning(turn.text)) if turn.reasons else None
        self._parser = ToolParser(turn.calls) if turn.calls else None
        self.called = 0
        """How many calls there were so far."""

    def read(self, text: str, *, last: bool) -> Part:
        """Take the next piece; `last`: none will follow."""
        reasoning, content = "", text
        if self._splitter:
            split = self._splitter.feed(text)
            reasoning, content = split.reasoning, split.content
            if last:
                rest = self._splitter.finish()
                reasoning, content = reasoning + rest.reasoning, content + rest.content
        calls: tuple[ToolCall, ...] = ()
        if self._parser:
            delta = self._parser.feed(content)
            content, calls = delta.content, delta.calls
            if last:
                end = self._parser.finish()
                content, calls = content + end.content, calls + end.calls
        self.called += len(calls)
        return Part(reasoning, content, calls)


def next_turn(tokenizer: Any, body: ChatRequest) -> Turn:
    """The turn that a request asks for. Raises ValueError, naming the field, for what the model cannot do."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    variables = dict(body.chat_template_kwargs or {})
    _check_variables(variables, template)
    markers = added_markers(tokenizer)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice = body.tool_choice if isinstance(body.tool_choice, str | None) else body.tool_choice.model_dump()
    parallel = body.parallel_tool_calls is not False
    plan = plan_tools(tools, choice, template, markers=markers, parallel=parallel)
    if plan.template_tools:
        variables["tools"] = plan.template_tools
    prompt = template_prompt(tokenizer, body.messages, variables)
    thinking = opens_reasoning(prompt["prompt"])
    guidance = body.guidance()
    if thinking and plan.guidance:
        plan = plan_tools(tools, choice, template, markers=markers, parallel=parallel, thinking=True)
    if thinking and guidance:
        guidance = after_reasoning(guidance, markers)
    return Turn(prompt["prompt_token_ids"], prompt["prompt"], plan.guidance or guidance, plan.format, reasons(template))


def template_prompt(tokenizer: Any, messages: list[Message], variables: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt's text and tokens. Raises ValueError where the model has no template, or it refuses the messages, or
    has no place for a part of them."""
    if not tokenizer.chat_template:
        raise ValueError("messages: the model has no chat template; /v1/completions continues any text")
    form = tool_format(tokenizer.chat_template) if isinstance(tokenizer.chat_template, str) else None
    as_text = form is not None and form.name.startswith("deepseek")
    rendered = [message.for_template(arguments_as_text=as_text) for message in messages]
    _check_parts(tokenizer, rendered, variables)
    return chat_prompt(tokenizer, rendered, **variables)


def _check_parts(tokenizer: Any, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> None:
    """Names of speakers and calls that the template leaves out would vanish without a word."""
    marks: dict[str, str] = {}

    def mark(field: str) -> str:
        marks[field] = f"foveal-{len(marks)}-"
        return marks[field]

    marked = []
    for place, message in enumerate(messages):
        copy = dict(message)
        if "name" in copy and copy["role"] != "tool":  # a tool's name stands in the call that it answers
            copy["name"] = mark(f"messages[{place}].name")
        if calls := copy.get("tool_calls"):
            name = mark(f"messages[{place}].tool_calls")
            copy["tool_calls"] = [{**call, "function": {**call["function"], "name": name}} for call in calls]
        marked.append(copy)
    text = chat_text(tokenizer, marked, **variables) if marks else ""
    for field, sign in marks.items():
        if sign not in text:
            raise ValueError(f"{field} has no place in the model's chat template")


def _check_variables(variables: Mapping[str, Any], template: str | None) -> None:
    """A variable that the template does not have would do nothing."""
    reserved = {"messages", "tools", "tokenize", "add_generation_prompt", "chat_template", "return_dict"}
    for name in variables:
        if name in reserved or template is None or name not in template:
            raise ValueError(f"chat_template_kwargs has {json.dumps(name)}, which the model's chat template has not")

"""Tool calls: what OpenAI's `tools` and `tool_choice` mean for the prompt and the completion, and calls read from text.

How a model writes its calls is learned from its chat template. Known are Hermes' way (Qwen 2.5 and 3 among others) and
DeepSeek's three: V3 and R1, V3.1, and V3.2's DSML.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveal.engine.guidance import Guidance, check_schema
from foveal.server.markup import LarkRules, Markers, find_first, held_back
from foveal.server.reasoning import BLANK, CLOSE, OPEN, reasons

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_PARAMETERS = {"additionalProperties": False}
_PLAIN_SCHEMA = {
    *("type", "properties", "required", "additionalProperties", "$defs", "definitions"),
    *("title", "description", "$schema", "x-guidance"),
}
_JSON_BLOCK = "```json"
_PARAMETER = re.compile(
    r'\s*<｜DSML｜parameter name="([^"]*)" string="(true|false)">(.*?)</｜DSML｜parameter>\s*', re.DOTALL
)


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its arguments, the text of a JSON object."""

    name: str
    arguments: str


class _Unfinished(Exception):
    """The end mark stood inside a string."""


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls."""

    name: str
    outer: tuple[str, str]
    """What stands around all calls together."""
    inner: tuple[str, str]
    """What stands around each call."""
    separator: str
    read: Callable[[str], ToolCall | None]
    """The call in the text between the inner marks; None: it is none. Raises _Unfinished."""
    write: Callable[[LarkRules, str, Mapping[str, Any]], str]
    """A Lark fragment of that text, for calls of one function with a schema of its arguments."""

    @property
    def first(self) -> str:
        """The first mark of the first call."""
        return self.outer[0].rstrip() or self.inner[0]


@dataclass(frozen=True)
class ToolPlan:
    """What a request's tools come to."""

    template_tools: list[dict[str, Any]] | None
    """What the chat template gets as `tools`; None: nothing."""
    guidance: Guidance | None
    """The form of a completion that must call; None: it is free."""
    format: ToolFormat | None
    """How calls are to be read from the completion; None: it is text and nothing else."""


def tool_format(template: str | None) -> ToolFormat | None:
    """How models with this chat template write calls; None: it takes no tools, or in a way that is not known."""
    if template is None or not re.search(r"\btools\b", template):
        return None  # some templates write earlier calls but say nothing of the tools that there are
    if "｜DSML｜" in template:
        return DEEPSEEK_V32
    if "<｜tool▁call▁begin｜>" in template:
        return DEEPSEEK_V3 if _JSON_BLOCK in template else DEEPSEEK_V31
    others = ("<function=", "<arg_key>")  # Qwen3-Coder's and GLM's ways begin with the same mark
    if "<tool_call>" in template and not any(mark in template for mark in others):
        return HERMES
    return None


def plan_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
    template: str | None,
    *,
    markers: Markers,
    parallel: bool = True,
    thinking: bool = False,
) -> ToolPlan:
    """What OpenAI's `tools` and `tool_choice` mean for a model.

    tool_choice: "none", "auto" (the default where there are tools), "required", or {"type": "function", "function":
    {"name": ...}}. A forced call gets a guidance under which the completion is calls and nothing else, whose arguments
    are valid under the functions' schemas; so does "auto" where a function is `strict`, around which any text may
    stand. `template`: the model's chat template; `markers`: see `added_markers`; `parallel`: more than one call may be
    made; `thinking`: the prompt ends inside reasoning, which may go on first.

    Raises ValueError, naming the field, for tools that are malformed or that the model has no way to call.
    """
    functions = _functions(tools or ())
    forced = _forced(tool_choice, functions)
    if not functions or tool_choice == "none":
        return ToolPlan(None, None, None)
    kind = tool_format(template)
    if kind is None:
        raise ValueError("tools: the model's chat template has no way of calling tools that is known")
    plan = [dict(tool) for tool in tools or ()]
    rules = LarkRules(markers)
    if forced:
        several = parallel and not isinstance(tool_choice, Mapping)
        calls = _calls(rules, kind, forced, several=several)
    elif any(function.get("strict") for function in functions.values()) or not parallel:
        calls = rules.rule(_free(rules, kind, functions, parallel=parallel))
    else:
        return ToolPlan(plan, None, kind)
    thought = f"{rules.until(CLOSE)} {rules.rule(BLANK)}"
    if not thinking:
        thought = f"({rules.text(OPEN)} {thought})?" if reasons(template) else ""
    return ToolPlan(plan, rules.guidance(f"{thought} {calls}"), kind)


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By name. Raises ValueError where one is malformed."""
    functions: dict[str, Mapping[str, Any]] = {}
    for place, tool in enumerate(tools):
        if tool.get("type") != "function" or not isinstance(tool.get("function"), Mapping):
            raise ValueError(f'tools[{place}] must be {{"type": "function", "function": {{...}}}}')
        function = tool["function"]
        name, schema = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"tools[{place}].function.name must be 1 to 64 of A-Z a-z 0-9 _ . -, not {name!r}")
        if name in functions:
            raise ValueError(f"tools[{place}].function.name = {name!r} is there twice")
        if not (schema is None or (isinstance(schema, Mapping) and schema.get("type", "object") == "object")):
            raise ValueError(f"tools[{place}].function.parameters must be a JSON schema of an object, not {schema!r}")
        functions[name] = function
    return functions


def _forced(
    choice: str | Mapping[str, Any] | None, functions: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The functions of which one must be called; none: that is left to the model."""
    if choice in (None, "none", "auto"):
        return {}
    if choice == "required":
        if not functions:
            raise ValueError("tool_choice = 'required' needs tools")
        return dict(functions)
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise ValueError(
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}, '
            f"not {choice!r}"
        )
    name = function["name"]
    if name not in functions:
        raise ValueError(f"tool_choice names {name!r}, which is not among tools")
    return {name: functions[name]}


def _calls(
    rules: LarkRules,
    kind: ToolFormat,
    functions: Mapping[str, Mapping[str, Any]],
    *,
    several: bool,
    begun: bool = False,
) -> str:
    """One call or several; `begun`: the first mark is there already."""
    ways = []
    for name, function in functions.items():
        schema = {"type": "object", "properties": {}, **(function.get("parameters") or _NO_PARAMETERS)}
        check_schema(schema, f"tools: {name}")
        body = kind.write(rules, name, schema)
        ways.append(f"{body} {rules.text(kind.inner[1])}")
    body = rules.rule(" | ".join(ways))
    opening, closing = kind.outer
    opened = f"{rules.text(kind.inner[0])} {body}"
    if not begun:
        first = f"{rules.text(opening)} {opened}"
    elif opening:
        first = f"{rules.text(opening[len(kind.first) :])} {opened}"
    else:
        first = body
    more = f"({rules.text(kind.separator)} {opened})*" if several else ""
    return f"{first} {more} {rules.text(closing)}"


def _free(rules: LarkRules, kind: ToolFormat, functions: Mapping[str, Mapping[str, Any]], *, parallel: bool) -> str:
    """Any text, and then calls or none; arguments of functions that are not `strict` are any JSON object."""
    loose = {"type": "object"}
    schemas = {
        name: function if function.get("strict") else {**function, "parameters": loose}
        for name, function in functions.items()
    }
    calls = _calls(rules, kind, schemas, several=parallel, begun=True)
    return f"{rules.without(kind.first)} | {rules.until(kind.first)} {calls}"


@dataclass(frozen=True)
class ToolDelta:
    """What one piece of text adds: text for the reader, and calls that are complete."""

    content: str = ""
    calls: tuple[ToolCall, ...] = ()


class ToolParser:
    """Parts a completion's text, which may come in pieces of any size, into content and calls.

    A call is given out once it is whole. What looks like one and is none is text like any other. White space beside
    calls is dropped. However the text is cut, the pieces add up to the same.
    """

    def __init__(self, form: ToolFormat) -> None:
        self._form = form
        self._marks = [form.inner[0], *(mark.strip() for mark in form.outer if mark)]
        self._held = ""
        self._inside = False
        """Whether what is held begins with a call's opening mark."""
        self._called = False
        """Whether a call, or a mark of calls, came last: white space after it is dropped."""
        self._searched = 0

    def feed(self, text: str) -> ToolDelta:
        """Take the next piece."""
        self._held += text
        content: list[str] = []
        calls: list[ToolCall] = []
        while self._call(content, calls) if self._inside else self._text(content):
            pass
        return ToolDelta("".join(content), tuple(calls))

    def finish(self) -> ToolDelta:
        """No text follows: what was held back. A whole call that lacks its end mark is one."""
        held, self._held = self._held, ""
        if self._inside:
            call = self._read(held[len(self._form.inner[0]) :])
            if call:
                return ToolDelta(calls=(call,))
        return ToolDelta("" if self._called and not held.strip() else held)

    def _text(self, content: list[str]) -> bool:
        """Give out text; whether a mark was found."""
        found = find_first(self._held, self._marks)
        if found is None:
            keep = held_back(self._held, self._marks)
            # White space may stand before a mark.
            shown = self._held[: len(self._held) - keep].rstrip()
            self._show(shown, content)
            self._held = self._held[len(shown) :]
            return False
        at, mark = found
        self._show(self._held[:at].rstrip(), content)
        self._inside = mark == self._form.inner[0]
        self._called = True
        self._held = self._held[at if self._inside else at + len(mark) :]
        self._searched = len(mark)
        return True

    def _show(self, text: str, content: list[str]) -> None:
        if self._called:
            text = text.lstrip()
        if text:
            content.append(text)
            self._called = False

    def _call(self, content: list[str], calls: list[ToolCall]) -> bool:
        """Give out the call that is whole, if one is; whether there was an end mark."""
        opening, closing = self._form.inner
        at = self._held.find(closing, self._searched)
        if at < 0:
            self._searched = max(len(opening), len(self._held) - len(closing) + 1)
            return False
        end = at + len(closing)
        try:
            call = self._form.read(self._held[len(opening) : at])
        except _Unfinished:
            self._searched = end
            return True
        if call:
            calls.append(call)
        else:
            self._called = False
            content.append(self._held[:end])
        self._held, self._inside = self._held[end:], False
        return True

    def _read(self, body: str) -> ToolCall | None:
        try:
            return self._form.read(body)
        except _Unfinished:
            return None


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text is; None: it is none."""
    try:
        # Models write line breaks into strings as they are.
        value = json.loads(text, strict=False, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string"):
            raise _Unfinished from None
        return None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _made(name: Any, arguments: Any) -> ToolCall | None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
        return None
    try:
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except ValueError:  # a number beyond all floats
        return None


def _read_hermes(body: str) -> ToolCall | None:
    call = _object(body)
    if call is None:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return _made(call.get("name"), _object(arguments) if isinstance(arguments, str) else arguments)


def _read_v3(body: str) -> ToolCall | None:
    kind, _, rest = body.partition("<｜tool▁sep｜>")
    name, mark, arguments = rest.partition(_JSON_BLOCK)
    if kind.strip() != "function" or not mark:
        return None
    return _made(name.strip(), _object(arguments.strip().removesuffix("```")))


def _read_v31(body: str) -> ToolCall | None:
    name, mark, arguments = body.partition("<｜tool▁sep｜>")
    return _made(name.strip(), _object(arguments)) if mark else None


def _read_v32(body: str) -> ToolCall | None:
    name, mark, rest = body.partition('">')
    arguments: dict[str, Any] = {}
    place = 0
    while mark and (found := _PARAMETER.match(rest, place)):
        key, plain, value = found.groups()
        try:
            parsed = value if plain == "true" else json.loads(value, strict=False, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return None
        arguments[key] = parsed
        place = found.end()
    return _made(name, arguments) if mark and not rest[place:].strip() else None


def _write_hermes(rules: LarkRules, name: str, schema: Mapping[str, Any]) -> str:
    before = rules.text(f'\n{{"name": "{name}", "arguments": ')
    return f"{before} {rules.json(schema)} {rules.text('}' + chr(10))}"


def _write_v3(rules: LarkRules, name: str, schema: Mapping[str, Any]) -> str:
    before = rules.text(f"function<｜tool▁sep｜>{name}\n{_JSON_BLOCK}\n")
    return f"{before} {rules.json(schema)} {rules.text(chr(10) + '```')}"


def _write_v31(rules: LarkRules, name: str, schema: Mapping[str, Any]) -> str:
    return f"{rules.text(f'{name}<｜tool▁sep｜>')} {rules.json(schema)}"


def _write_v32(rules: LarkRules, name: str, schema: Mapping[str, Any]) -> str:
    """Parameters in the schema's order. Strings without further rules are written as they are, all else as JSON.

    Raises ValueError for a schema that says more than which parameters there are."""
    required = schema.get("required", ())
    beyond = [key for key in schema if key not in _PLAIN_SCHEMA]
    odd = [key for key in {*schema.get("properties", {}), *required} if '"' in key or key not in schema["properties"]]
    if beyond or odd:
        raise ValueError(f"tools: {name}: {(beyond or odd)[0]!r} in parameters cannot be kept in this model's format")
    fragments = [rules.text(f'{name}">\n')]
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    for key, value in schema.get("properties", {}).items():
        one = {**value, **shared} if isinstance(value, Mapping) else shared
        plain = one.get("type") == "string" and not set(one) - {"type", "description", "title", "default"}
        end = "</｜DSML｜parameter>"
        head = rules.text(f'<｜DSML｜parameter name="{key}" string="{"true" if plain else "false"}">')
        body = rules.until(end) if plain else f"{rules.json(one)} {rules.text(end)}"
        whole = f"{head} {body} {rules.text(chr(10))}"
        fragments.append(whole if key in required else f"({whole})?")
    return " ".join(fragments)


HERMES = ToolFormat(
    "hermes",
    outer=("", ""),
    inner=("<tool_call>", "</tool_call>"),
    separator="\n",
    read=_read_hermes,
    write=_write_hermes,
)
DEEPSEEK_V3 = ToolFormat(
    "deepseek-v3",
    outer=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    inner=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    separator="\n",
    read=_read_v3,
    write=_write_v3,
)
DEEPSEEK_V31 = ToolFormat(
    "deepseek-v3.1",
    outer=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    inner=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    separator="",
    read=_read_v31,
    write=_write_v31,
)
DEEPSEEK_V32 = ToolFormat(
    "deepseek-v3.2",
    outer=("<｜DSML｜function_calls>\n", "\n</｜DSML｜function_calls>"),
    inner=('<｜DSML｜invoke name="', "</｜DSML｜invoke>"),
    separator="\n",
    read=_read_v32,
    write=_write_v32,
)

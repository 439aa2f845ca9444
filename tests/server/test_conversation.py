"""Forms of answers, tool calls and reasoning, through OpenAI's client."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from bytewise import write_tiny_model

from foveal import LLM

from .serving import MODEL, Server, serving

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call></tool_call>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content.split('</think>')[-1] }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% if m.tool_call_id %}[{{ m.tool_call_id }}]{% endif %}\n{% endfor %}"
    "assistant:{% if enable_thinking %}<think>\n{% endif %}"
)
USER: Any = [{"role": "user", "content": "Hi"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 999}, "kind": {"enum": ["a", "b"]}},
    "required": ["size", "kind"],
    "additionalProperties": False,
}
NO_THINKING = {str(ord("h") - ord("!")): -100}
"""For this random model would never come to the end of its thoughts."""
TOOLS: Any = [
    {"type": "function", "function": {"name": "measure", "description": "Measures.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop_it"}},
]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model whose template knows tools and reasoning."""
    folder = write_tiny_model(tmp_path_factory.mktemp("thinker"), max_positions=2048, template=TEMPLATE)
    with serving(LLM(folder, max_num_seqs=8)) as server:
        yield server


@pytest.fixture
def chat(thinker: Server) -> Iterator[Any]:
    """`client.chat.completions.create`, for greedy answers of this model."""
    with thinker.client() as client:
        yield lambda **settings: client.chat.completions.create(
            **{"model": MODEL, "messages": USER, "seed": 4, "max_tokens": 300, "logit_bias": NO_THINKING} | settings
        )
    thinker.settle()


def test_json(chat: Any, client: openai.OpenAI) -> None:
    """Guards response_format: an object, and one under a schema, for both endpoints and in a stream."""
    bias = {"logit_bias": {str(ord("}") - ord("!")): 20}}  # so that a random model comes to an end
    answer = chat(response_format={"type": "json_object"}, **bias).choices[0]
    assert answer.finish_reason == "stop" and isinstance(json.loads(answer.message.content), dict)
    form = {"type": "json_schema", "json_schema": {"name": "size", "schema": SCHEMA, "strict": True}}
    answer = chat(response_format=form).choices[0]
    jsonschema.validate(json.loads(answer.message.content), SCHEMA)
    text = "".join(event.choices[0].delta.content or "" for event in chat(response_format=form, stream=True))
    assert text == answer.message.content
    done = client.completions.create(model=MODEL, prompt="x", max_tokens=100, extra_body={"response_format": form})
    jsonschema.validate(json.loads(done.choices[0].text), SCHEMA)


def test_expressions_and_grammars(client: openai.OpenAI) -> None:
    """Guards structured_outputs."""
    for form, follows in (
        ({"regex": "[a-c]{3}-[0-9]{2,4}"}, re.compile("[a-c]{3}-[0-9]{2,4}")),
        ({"grammar": 'start: "yes" | "no" " way"?'}, re.compile("yes|no( way)?")),
    ):
        extra = {"structured_outputs": form}
        done = client.completions.create(model=MODEL, prompt="x", max_tokens=50, seed=1, extra_body=extra)
        assert follows.fullmatch(done.choices[0].text) and done.choices[0].finish_reason == "stop"


def test_an_emoji_split_over_tokens(client: openai.OpenAI) -> None:
    """Guards against half characters in a stream: here every character takes four tokens."""
    extra = {"structured_outputs": {"regex": "(😀|🙃|🧪){9}"}}
    settings: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 60, "seed": 2, "extra_body": extra}
    whole = client.completions.create(**settings).choices[0].text
    pieces = [event.choices[0].text for event in client.completions.create(stream=True, **settings)]
    assert len(whole) == 9 and "".join(pieces) == whole and set(whole) <= set("😀🙃🧪")
    assert len([piece for piece in pieces if piece]) >= 5, "it came all at once"
    cut = client.completions.create(**settings | {"max_tokens": 6}).choices[0]
    assert cut.text == whole[0] + "\N{REPLACEMENT CHARACTER}" and cut.finish_reason == "length"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "measure"}}])
def test_a_forced_call(chat: Any, choice: Any) -> None:
    """Guards calls whole and streamed: the same ones, with arguments that the schema allows."""
    tools = TOOLS[:1] if choice == "required" else TOOLS
    answer = chat(tools=tools, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.function.name == "measure" and call.type == "function" and call.id
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)

    events = list(chat(tools=tools, tool_choice=choice, parallel_tool_calls=False, stream=True))
    (delta,) = [one for event in events for one in event.choices[0].delta.tool_calls or []]
    assert (delta.index, delta.function.name, delta.function.arguments) == (0, "measure", call.function.arguments)
    assert events[-1].choices[0].finish_reason == "tool_calls"
    assert not any(event.choices[0].delta.content for event in events)


def test_a_conversation_with_calls(chat: Any, thinker: Server) -> None:
    """Guards the way back: the assistant's message as it came, and the tool's answer."""
    call = chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0].message
    messages = [*USER, call, {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "42"}]
    assert chat(messages=messages, tools=TOOLS, max_tokens=5).usage.completion_tokens == 5
    with thinker.client() as client:
        body = {"messages": [*USER, call.model_dump(), messages[-1]]}
        tokens = client.post("/../tokenize", body=body, cast_to=dict)["tokens"]
        text = client.post("/../detokenize", body={"tokens": tokens}, cast_to=dict)["prompt"]
    arguments = json.loads(call.tool_calls[0].function.arguments)
    written = json.loads(re.findall("<tool_call>(.*)</tool_call>", text)[0])
    assert written == {"name": call.tool_calls[0].function.name, "arguments": arguments}
    assert f"tool:42[{call.tool_calls[0].id}]" in text


def test_without_a_choice_the_model_is_free(chat: Any) -> None:
    """Guards "auto" and "none": text as it would be, and tools only in the prompt."""
    plain = chat(max_tokens=20)
    none = chat(max_tokens=20, tools=TOOLS, tool_choice="none")
    auto = chat(max_tokens=20, tools=TOOLS)
    assert none.choices == plain.choices and none.usage.prompt_tokens == plain.usage.prompt_tokens
    assert auto.usage.prompt_tokens > plain.usage.prompt_tokens and auto.choices[0].finish_reason == "length"


def test_reasoning_is_apart(chat: Any) -> None:
    """Guards reasoning whole and streamed, and forms that begin after it."""
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    bias = {str(ord(letter) - ord("!")): 25 for letter in "</think>"}
    settings: dict[str, Any] = {"extra_body": thinking, "response_format": form, "logit_bias": bias, "max_tokens": 1500}
    answer = chat(**settings).choices[0]
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.message.content), SCHEMA)
    events = list(chat(**settings, stream=True))
    said = [
        "".join(getattr(event.choices[0].delta, name, None) or "" for event in events)
        for name in ("reasoning_content", "content")
    ]
    assert said == [answer.message.reasoning_content or "", answer.message.content]
    assert said[0] and "</think>" not in said[0] + said[1]
    assert chat(extra_body=thinking, max_tokens=9).choices[0].message.content == ""


def test_a_model_without_a_template(tmp_path: Path) -> None:
    """Guards against another library's words about a template that clients cannot give, and a list that hides it."""
    with serving(LLM(write_tiny_model(tmp_path, template=""), max_num_seqs=1)) as server, server.client() as client:
        for path in ("/chat/completions", "/../tokenize"):
            body: dict[str, Any] = {"model": MODEL, "messages": USER}
            with pytest.raises(openai.BadRequestError, match="/v1/completions continues any text") as refused:
                client.post(path, body=body, cast_to=dict)
            assert refused.value.param == "messages"
        assert client.models.retrieve(MODEL).model_extra == {"max_model_len": 512, "chat": False}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}},
            "response_format",
        ),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs.regex"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"functions": []}, "functions"),
        ({"messages": [USER[0] | {"name": "Ann"}]}, "messages[0].name"),
        ({"chat_template_kwargs": {"mood": "good"}}, "chat_template_kwargs"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": []}, {"role": "assistant", "content": None}]},
            "messages[1].content",
        ),
    ],
)
def test_nonsense_is_refused_by_name(thinker: Server, change: dict[str, Any], param: str) -> None:
    """Guards against a form, a tool or a message that is dropped or ends in a 500."""
    with thinker.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.post(
            "/chat/completions", body={"model": MODEL, "messages": USER, "max_tokens": 3} | change, cast_to=dict
        )
    assert refused.value.param == param

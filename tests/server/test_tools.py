"""Tool calls: read from text however it is cut, and forced on random tiny models."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import make_oracle
from tokenizers import AddedToken
from words import byte_level, save_words

from foveal import LLM, Guidance, SamplingParams
from foveal.server.markup import added_markers
from foveal.server.reasoning import ReasoningSplitter, after_reasoning
from foveal.server.tools import (
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    DEEPSEEK_V32,
    HERMES,
    ToolCall,
    ToolFormat,
    ToolParser,
    plan_tools,
    tool_format,
)

FORMATS = {form.name: form for form in (HERMES, DEEPSEEK_V3, DEEPSEEK_V31, DEEPSEEK_V32)}
TEMPLATES = {
    "hermes": "{% if tools %}<tool_call></tool_call>{% endif %}",
    "deepseek-v3": "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>```json",
    "deepseek-v3.1": "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    "deepseek-v3.2": "{{ tools }}<｜DSML｜function_calls>",
}
# Two calls as the models' authors write them.
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"city": "Köln", "n": 3}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
    "deepseek-v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    '{"city": "Köln", "n": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"city": "Köln", "n": 3}'
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.2": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="city" string="true">Köln</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
}
CALLS = [ToolCall("f", '{"city": "Köln", "n": 3}'), ToolCall("g", "{}")]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "where"},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["n", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "a", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "g"}},
]


def parse(form: ToolFormat, pieces: list[str]) -> tuple[str, list[ToolCall]]:
    parser = ToolParser(form)
    parts = [*map(parser.feed, pieces), parser.finish()]
    return "".join(part.content for part in parts), [call for part in parts for call in part.calls]


@pytest.mark.parametrize("name", FORMATS)
def test_calls_and_the_text_around_them(name: str) -> None:
    """Guards against marks and white space that leak, and calls that are lost."""
    form, text = FORMATS[name], WRITTEN[name]
    for pieces in ([text], list(text)):
        assert parse(form, pieces) == ("", CALLS)
    assert parse(form, [f"Let me see.\n\n{text}\n"]) == ("Let me see.", CALLS)
    assert parse(form, list(f"a < b {text} c d\n")) == ("a < bc d\n", CALLS)
    assert parse(form, [" just text <\n"]) == (" just text <\n", [])


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_call_stays_text(name: str) -> None:
    """Guards against a broken call that vanishes, or is passed on as one."""
    form = FORMATS[name]
    opening, closing = form.inner
    bodies = ["", "nonsense", '{"name": 3}', '{"name": "f", "arguments": [1]}', '">', 'f<｜tool▁sep｜>{"a": NaN}']
    for body in [*bodies, '{"name": "f", "arguments": {"a": 1e999}}']:
        text = f"{opening}{body}{closing}"
        assert parse(form, [text]) == (text, [])
    cut = WRITTEN[name][: WRITTEN[name].index("Köln")]
    content, calls = parse(form, [cut])
    assert not calls and "f" in content


@pytest.mark.parametrize("name", FORMATS)
@given(choices=st.lists(st.integers(0, 99), max_size=8), cuts=st.lists(st.integers(0, 500), max_size=10))
def test_any_cut_gives_the_same(name: str, choices: list[int], cuts: list[int]) -> None:
    """Guards against a mark that leaks because it came in two pieces."""
    form = FORMATS[name]
    marks = [*form.inner, *form.outer, "<", "｜", "tool", "\n", " ", "text", WRITTEN[name], '{"name": "f"}', '"']
    pieces = [marks[choice % len(marks)] for choice in choices]
    text = "".join(pieces)
    ends = sorted({min(cut, len(text)) for cut in cuts})
    again = [text[start:stop] for start, stop in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert parse(form, [text]) == parse(form, pieces) == parse(form, again) == parse(form, list(text))


def test_hermes_details() -> None:
    """Guards against an end mark in a string that ends the call, arguments as text, and a lost last call."""
    body = {"name": "f", "arguments": {"doc": "write </tool_call> at the end"}}
    text = f"<tool_call>{json.dumps(body)}</tool_call>"
    assert parse(HERMES, list(text))[1] == [ToolCall("f", json.dumps(body["arguments"]))]
    text = '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>'
    assert parse(HERMES, [text])[1] == [ToolCall("f", '{"a": 1}')]
    assert parse(HERMES, ['<tool_call>\n{"name": "f", "arguments": {"a": "1\n2"}}'])[1] == [
        ToolCall("f", '{"a": "1\\n2"}')
    ]


def test_formats_are_known_by_their_templates() -> None:
    """Guards against a format taken for another, and tools that a template drops without a word."""
    for name, template in TEMPLATES.items():
        assert tool_format(template) is FORMATS[name]
        assert tool_format(template.replace("tools", "tool")) is None
    assert tool_format("{{ tools }}<tool_call><function=f>") is None
    assert tool_format("{{ tools }}") is None and tool_format(None) is None


@pytest.fixture(scope="module", params=["letters", "tokens"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A tokenizer with the marks as tokens, and one without."""
    folder = tmp_path_factory.mktemp("tools")
    words = byte_level("gpt-2")
    if request.param == "tokens":
        marks = ["<tool_call>", "</tool_call>", "<think>", "</think>", "｜DSML｜", "<｜tool▁sep｜>"]
        marks += [mark for form in (DEEPSEEK_V3,) for mark in (*form.outer, *form.inner)]
        words.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    tokens = save_words(words, folder)
    make_oracle("llama", folder, vocab_size=tokens, max_position_embeddings=1024, num_hidden_layers=1)
    return LLM(folder, dtype="float32")


def answer(llm: LLM, guidance: Guidance | None, seed: int) -> str:
    params = SamplingParams(max_tokens=700, seed=seed, guidance=guidance)
    output = llm.generate("the", params)[0]
    assert output.error is None and output.outputs[0].finish_reason == "stop"
    return output.outputs[0].text


@pytest.mark.parametrize("name", FORMATS)
def test_a_forced_call_is_made(llm: LLM, name: str) -> None:
    """Guards against a forced call that its own parser cannot read, or arguments that break the schema."""
    markers = added_markers(llm.tokenizer)
    cities = SCHEMA["properties"] | {"city": {"enum": ["Köln", 'a"b']}}
    schema = SCHEMA | {"properties": cities, "required": ["n", "kind", "city"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    choice = {"type": "function", "function": {"name": "f"}}
    plan = plan_tools(tools, choice, TEMPLATES[name], markers=markers)
    assert plan.template_tools == tools and plan.format is FORMATS[name]
    for seed in range(3):
        content, calls = parse(FORMATS[name], [answer(llm, plan.guidance, seed)])
        assert not content and [call.name for call in calls] == ["f"]
        jsonschema.validate(json.loads(calls[0].arguments), schema)
    plan = plan_tools([TOOLS[1]], "required", TEMPLATES[name], markers=markers, parallel=False)
    assert parse(FORMATS[name], [answer(llm, plan.guidance, 1)]) == ("", [ToolCall("g", "{}")])


def test_reasoning_may_come_first(llm: LLM) -> None:
    """Guards against a form that cuts off the reasoning which the prompt has opened."""
    markers = added_markers(llm.tokenizer)
    # The tiny model would seldom end its reasoning by itself.
    close = llm.tokenizer.encode("</think>", add_special_tokens=False)[0]
    bias = {close: 100.0} if len(llm.tokenizer.encode("</think>", add_special_tokens=False)) == 1 else None
    plan = plan_tools([TOOLS[1]], "required", TEMPLATES["hermes"], markers=markers, parallel=False, thinking=True)
    for guidance in (plan.guidance, after_reasoning(Guidance(regex="a/[bc]"), markers)):
        params = SamplingParams(max_tokens=300, guidance=guidance, logit_bias=bias, temperature=0.0)
        output = llm.generate("the<think>", params)[0].outputs[0]
        splitter = ReasoningSplitter(inside=True)
        content = splitter.feed(output.text).content + splitter.finish().content
        if bias is None:
            assert not content or output.finish_reason == "stop"
        elif guidance is plan.guidance:
            assert parse(HERMES, [content]) == ("", [ToolCall("g", "{}")])
        else:
            assert content in ("a/b", "a/c")


def test_strict_functions_bind_free_text(llm: LLM) -> None:
    """Guards against `strict` that is taken and not kept where the model may choose."""
    markers = added_markers(llm.tokenizer)
    tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"const": {"a": 1}}}}]
    plan = plan_tools(tools, "auto", TEMPLATES["hermes"], markers=markers, parallel=False)
    assert plan.guidance is not None
    guide = llm.engine._grammars.guide(plan.guidance)

    def follows(text: str) -> bool:
        one = llm.engine._grammars.guide(plan.guidance)
        try:
            one.follow(llm.tokenizer.encode(text, add_special_tokens=False))
            one.allowed()
        except ValueError:
            return False
        return True

    good = 'so: <tool_call>\n{"name": "f", "arguments": {"a":1}}\n</tool_call>'
    assert guide is not None and follows("any <text> at all") and follows(good[:-3])
    assert not follows(good.replace("1}", "2}"))
    assert plan_tools(TOOLS, "auto", TEMPLATES["hermes"], markers=markers).guidance is None


def test_no_tools() -> None:
    """Guards against tools shown to a model that must not call them."""
    for tools, choice in ((TOOLS, "none"), (None, None), ([], "auto")):
        plan = plan_tools(tools, choice, TEMPLATES["hermes"], markers={})
        assert (plan.template_tools, plan.guidance, plan.format) == (None, None, None)


@pytest.mark.parametrize(
    "tools, choice, words",
    [
        (TOOLS, "sometimes", "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "h"}}, "'h'"),
        (None, "required", "needs tools"),
        ([{"type": "search"}], None, r"tools\[0\]"),
        ([{"type": "function", "function": {"name": "no spaces"}}], None, "no spaces"),
        ([TOOLS[0], TOOLS[0]], None, "twice"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}], None, "parameters"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}], "required", "f: .*not"),
    ],
)
def test_nonsense_is_refused(tools: Any, choice: Any, words: str) -> None:
    """Guards against tools that are dropped, or an error that does not name them."""
    with pytest.raises(ValueError, match=words):
        plan_tools(tools, choice, TEMPLATES["hermes"], markers={})


@pytest.mark.parametrize("schema", [{"anyOf": [{"required": ["a"]}]}, {"required": ["a"]}, {"properties": {'a"': {}}}])
def test_what_a_format_cannot_keep_is_refused(schema: dict[str, Any]) -> None:
    """Guards against a forced call whose arguments break the schema, because the format writes them one by one."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(ValueError, match=r"f: .*format"):
        plan_tools(tools, "required", TEMPLATES["deepseek-v3.2"], markers={})
    assert plan_tools(tools, "auto", TEMPLATES["deepseek-v3.2"], markers={}).guidance is None


def test_a_model_without_a_way_of_calling_says_so() -> None:
    """Guards against tools that are accepted and never reach the model."""
    with pytest.raises(ValueError, match="chat template"):
        plan_tools(TOOLS, "auto", "{{ messages }}", markers={})

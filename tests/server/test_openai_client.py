"""Every endpoint through OpenAI's own client over a real socket."""

from typing import Any

import openai
import pytest

import foveal
from foveal import LLM, SamplingParams

from .serving import MODEL, Server, every_token_seen

PROMPT = "Once upon a time"
GREEDY = {"model": MODEL, "temperature": 0.0}


@pytest.fixture(scope="module")
def llm(tiny_folder: str) -> LLM:
    """The same model without a server."""
    return LLM(tiny_folder, max_num_seqs=4)


@pytest.fixture(scope="module")
def expected(llm: LLM) -> str:
    """What the library writes after the prompt."""
    return llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=24))[0].outputs[0].text


def test_completion(client: openai.OpenAI, expected: str) -> None:
    """Guards the text, the finish reason and the usage."""
    answer = client.completions.create(prompt=PROMPT, max_tokens=24, **GREEDY)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (16, 24, 40)


def test_default_length_is_openais(client: openai.OpenAI) -> None:
    """Guards against answers without end where max_tokens is left out."""
    usage = client.completions.create(prompt=PROMPT, **GREEDY).usage
    assert usage is not None and usage.completion_tokens == 16


def test_completion_stream(tiny: Server, client: openai.OpenAI, expected: str) -> None:
    """Guards against text lost or doubled between events, and against a stream without its usage."""
    with every_token_seen(tiny):
        stream = client.completions.create(
            prompt=PROMPT, max_tokens=24, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        events = list(stream)
    assert "".join(event.choices[0].text for event in events[:-1]) == expected
    assert [event.choices[0].finish_reason for event in events[:-1]] == [None] * (len(events) - 2) + ["length"]
    assert events[-1].choices == [] and events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 24
    assert len(events) > 3


def test_usage_as_it_grows(tiny: Server, client: openai.OpenAI) -> None:
    """Guards the figures that load generators read from every event."""
    options: dict[str, Any] = {"max_tokens": 6, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    with every_token_seen(tiny):
        for stream in (
            client.completions.create(prompt=PROMPT, **options, **GREEDY),
            client.chat.completions.create(messages=MESSAGES, **options, **GREEDY),
        ):
            counts = [event.usage.completion_tokens for event in stream if event.usage is not None]
            assert counts == sorted(counts) and set(range(2, 7)) <= set(counts)


def test_prompt_forms(client: openai.OpenAI, expected: str) -> None:
    """Guards against prompts taken apart or out of order: texts, token ids, lists of both."""
    ids = list(PROMPT.encode())
    tokens = client.post("/../tokenize", body={"prompt": PROMPT}, cast_to=dict)["tokens"]
    answers = [
        client.completions.create(prompt=prompt, max_tokens=24, **GREEDY).choices
        for prompt in (tokens, [PROMPT, "B"], [tokens, tokens[:3]])
    ]
    assert len(tokens) == len(ids)
    assert [len(choices) for choices in answers] == [1, 2, 2]
    assert [choices[0].text for choices in answers] == [expected] * 3
    assert [[choice.index for choice in choices] for choices in answers] == [[0], [0, 1], [0, 1]]
    alone = client.completions.create(prompt="B", max_tokens=24, **GREEDY)
    assert answers[1][1].text == alone.choices[0].text


def test_n(client: openai.OpenAI) -> None:
    """Guards against one completion where several were asked for, whole and streamed."""
    settings: dict[str, Any] = {"model": MODEL, "prompt": ["A", "B"], "n": 3, "seed": 5, "max_tokens": 8}
    whole = [choice.text for choice in client.completions.create(**settings).choices]
    assert len(set(whole)) == 6
    streamed = [""] * 6
    for event in client.completions.create(stream=True, **settings):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == whole


def test_a_stop_string_split_over_tokens(client: openai.OpenAI, expected: str) -> None:
    """Guards against a stop that is seen only within one token, and against its beginning shown in a stream."""
    stop = expected[9:13]
    end = expected.index(stop)
    answer = client.completions.create(prompt=PROMPT, max_tokens=24, stop=stop, **GREEDY)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected[:end], "stop")
    stream = client.completions.create(prompt=PROMPT, max_tokens=24, stop=["never there", stop], stream=True, **GREEDY)
    assert "".join(event.choices[0].text for event in stream) == expected[:end]


def test_logprobs_and_echo(client: openai.OpenAI, llm: LLM, expected: str) -> None:
    """Guards the lists that evaluation harnesses add up: an entry a token, the prompt's first, as in the library."""
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=3)
    output = llm.generate(PROMPT, params)[0]
    assert output.prompt_logprobs is not None and output.outputs[0].logprobs is not None
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    want = [
        entry and entry[token].logprob
        for token, entry in zip(ids, output.prompt_logprobs + output.outputs[0].logprobs, strict=True)
    ]
    choice = client.completions.create(prompt=PROMPT, max_tokens=4, logprobs=3, echo=True, **GREEDY).choices[0]
    got = choice.logprobs
    assert got is not None and got.token_logprobs is not None and got.top_logprobs is not None
    assert choice.text == PROMPT + output.outputs[0].text
    assert got.token_logprobs[0] is None and got.top_logprobs[0] is None
    assert got.token_logprobs[1:] == pytest.approx(want[1:], abs=1e-5)
    assert got.text_offset is not None and got.text_offset[: len(PROMPT)] == list(range(len(PROMPT)))
    assert got.tokens is not None and "".join(got.tokens[: len(PROMPT)]) == PROMPT
    assert all(0 < len(top) <= 3 for top in got.top_logprobs[1:] if top is not None)


def test_only_the_prompt(client: openai.OpenAI) -> None:
    """Guards max_tokens = 0: the prompt's log probabilities and not a token more."""
    answer = client.completions.create(prompt=PROMPT, max_tokens=0, logprobs=1, echo=True, **GREEDY)
    assert answer.choices[0].text == PROMPT and answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is not None and len(answer.choices[0].logprobs.token_logprobs or []) == 16
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_a_seed_repeats_alone_and_in_a_batch(client: openai.OpenAI) -> None:
    """Guards against draws that depend on what else runs."""
    settings: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "seed": 11, "temperature": 1.3}
    alone = [client.completions.create(prompt=PROMPT, **settings).choices[0].text for _ in range(2)]
    batch = client.completions.create(prompt=["x", PROMPT, "yy", PROMPT], **settings).choices
    assert {*alone, batch[1].text, batch[3].text} == {alone[0]}
    assert client.completions.create(prompt=PROMPT, **settings | {"seed": 12}).choices[0].text != alone[0]


def test_parameters_arrive(client: openai.OpenAI, llm: LLM) -> None:
    """Guards against a sampling parameter that is accepted and dropped."""
    plain: dict[str, Any] = {"temperature": 0.9, "seed": 3, "max_tokens": 12}
    cases: list[dict[str, Any]] = [
        {"top_p": 0.3},
        {"presence_penalty": 1.9},
        {"frequency_penalty": 1.9},
        {"logit_bias": {65: 50.0}},
        {"top_k": 2},
        {"min_p": 0.5},
        {"repetition_penalty": 1.8},
        {"ignore_eos": True},
        {"min_tokens": 3},
        {"stop_token_ids": [llm.generate(PROMPT, SamplingParams(**plain))[0].outputs[0].token_ids[5]]},
    ]
    own = ("top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids")
    base = llm.generate(PROMPT, SamplingParams(**plain))[0].outputs[0].text
    for case in cases:
        want = llm.generate(PROMPT, SamplingParams(**plain, **case))[0].outputs[0].text
        extra = {"extra_body": case} if set(case) & set(own) else case
        if "logit_bias" in case:
            extra = {"logit_bias": {"65": 50.0}}
        got = client.completions.create(model=MODEL, prompt=PROMPT, **plain, **extra)
        assert got.choices[0].text == want, case
        assert want != base or set(case) <= {"ignore_eos", "min_tokens"}, f"{case} changes nothing: no test of it"


MESSAGES: Any = [
    {"role": "developer", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
]


def test_chat(client: openai.OpenAI, llm: LLM) -> None:
    """Guards the template, the roles and parts of content."""
    output = llm.chat(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        SamplingParams(temperature=0.0, max_tokens=20),
    )[0]
    answer = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=20, **GREEDY)
    assert answer.choices[0].message.content == output.outputs[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(output.prompt_token_ids)
    stream = client.chat.completions.create(messages=MESSAGES, max_tokens=20, stream=True, **GREEDY)
    events = list(stream)
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == output.outputs[0].text
    assert events[-1].choices[0].finish_reason == "length"


def test_chat_without_a_limit_fills_the_context(client: openai.OpenAI, tiny: Server) -> None:
    """Guards against chat answers cut at the 16 tokens of the old endpoint."""
    usage = client.chat.completions.create(messages=MESSAGES, **GREEDY).usage
    assert usage is not None and usage.total_tokens == tiny.service.max_model_len == 512


def test_chat_logprobs(client: openai.OpenAI) -> None:
    """Guards tokens, their bytes and their rivals."""
    answer = client.chat.completions.create(messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=2, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 6
    text = b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode("utf-8", "replace")
    assert text == answer.choices[0].message.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 2 and entry.logprob == entry.top_logprobs[0].logprob


def test_models(client: openai.OpenAI) -> None:
    """Guards the list and a single one."""
    assert [model.id for model in client.models.list()] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert model.owned_by == "foveal" and model.model_extra == {"max_model_len": 512, "chat": True}
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_tokens_and_version(client: openai.OpenAI) -> None:
    """Guards the way to tokens and back."""
    tokens = client.post("/../tokenize", body={"prompt": "né 😀"}, cast_to=dict)
    assert tokens["count"] == len(tokens["tokens"]) == 8 and tokens["max_model_len"] == 512
    assert client.post("/../detokenize", body={"tokens": tokens["tokens"]}, cast_to=dict) == {"prompt": "né 😀"}
    chat = client.post("/../tokenize", body={"messages": [{"role": "user", "content": "Hi"}]}, cast_to=dict)
    assert chat["count"] == len("user:Hi\nassistant:")
    assert client.get("/../version", cast_to=dict) == {"version": foveal.__version__}


def test_a_repeated_prompt_is_reused(client: openai.OpenAI) -> None:
    """Guards prefix reuse over requests and its salt: under another salt nothing is found."""
    prompt = "a long beginning " * 12
    salts: list[dict[str, Any]] = [{}, {}, {"cache_salt": "one"}, {"cache_salt": "one"}, {"cache_salt": "two"}]
    cached = []
    for extra in salts:
        usage = client.completions.create(prompt=prompt, max_tokens=1, extra_body=extra, **GREEDY).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 192, 0, 192, 0]

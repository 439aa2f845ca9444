"""`foveal generate`: continue a prompt, or answer it."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveal.cli import options, session

if TYPE_CHECKING:
    from foveal.engine import RequestOutput


def generate(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; - reads standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file instead.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Put the prompt as a question, in the model's chat template.")
    ] = False,
    as_json: options.Json = False,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.Dtype = "auto",
    index_dtype: options.IndexDtype = "auto",
    kv_cache_dtype: options.KVCacheDtype = "auto",
    mla_form: options.MLAForm = "auto",
    quantization: options.Quantization = None,
    adapter: options.Adapter = None,
    streaming: options.Streaming = None,
) -> None:
    """Write what MODEL makes of PROMPT, token by token."""
    text = _prompt_text(prompt, file)
    from foveal import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop
    )
    messages = [{"role": "user", "content": text}]

    def length(tokenizer: Any) -> int:
        from foveal.engine.llm import chat_prompt

        ids = chat_prompt(tokenizer, messages)["prompt_token_ids"] if chat else tokenizer.encode(text)
        return len(ids) + max_tokens

    settings = {
        "dtype": dtype,
        "index_dtype": index_dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "mla_form": mla_form,
        "quantization": quantization,
        "adapter": adapter,
        "streaming": streaming,
    }
    llm = session.load(model, settings, length)
    stream = llm.stream(llm.chat_prompt(messages) if chat else text, params)
    if as_json:
        print(json.dumps({"model": model, **_measured(text, stream)}, ensure_ascii=False))
    else:
        session.write(stream)


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give exactly one of PROMPT and --file", param_hint="PROMPT")
    if file is not None:
        return file.read_text(encoding="utf-8")
    return sys.stdin.read() if prompt == "-" else str(prompt)


def _measured(prompt: str, stream: Iterator["RequestOutput"]) -> dict[str, Any]:
    """Run `stream` to its end: what it wrote, and how long that took."""
    start = time.perf_counter()
    moments = []
    for step in session.checked(stream):
        output = step
        moments.append(time.perf_counter() - start)
    answer = output.outputs[0]
    steps = len(moments) - 1
    return {
        "prompt": prompt,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "first_token_seconds": moments[0],
        "total_seconds": moments[-1],
        "tokens_per_second": steps / (moments[-1] - moments[0]) if steps else None,
    }

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
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help=f"MODEL: {options.MODEL} Left out: builtin. PROMPT: the text to continue; - reads standard input.",
        ),
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
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    index_dtype: options.IndexDtype = "auto",
    kv_cache_dtype: options.KVCacheDtype = "auto",
    mla_form: options.MLAForm = "auto",
    quantization: options.Quantization = None,
    adapter: options.Adapter = None,
    streaming: options.Streaming = None,
) -> None:
    """Write what MODEL makes of PROMPT, token by token.

    `foveal generate "The old man said"` takes the model that comes with foveal.
    """
    model, text = _model_and_prompt(words or [], file)
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
        "device": device,
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


def _model_and_prompt(words: list[str], file: Path | None) -> tuple[str, str]:
    """A lone word is a prompt for the model inside the package, or a model's name where a file has the prompt."""
    models = words if file is not None else words[:-1]
    if len(models) > 1 or (file is None and not words):
        raise typer.BadParameter("give one MODEL at most, and exactly one of PROMPT and --file", param_hint="PROMPT")
    from foveal.models.resolve import BUILTIN, names_a_model

    model = models[0] if models else BUILTIN
    if file is not None:
        return model, file.read_text(encoding="utf-8")
    prompt = words[-1]
    if not models and names_a_model(prompt):
        hint = f"to continue these words themselves: foveal generate {BUILTIN} {prompt}"
        raise typer.BadParameter(f"{prompt} names a model, and there is no text; {hint}", param_hint="PROMPT")
    return model, sys.stdin.read() if prompt == "-" else prompt


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

"""`foveal chat`: a conversation in the terminal, or one line of standard input after another."""

import sys

from foveal.cli import options, session


def chat(
    model: options.Model,
    max_tokens: options.MaxTokens = 1024,
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
    """Talk with MODEL. /reset forgets what was said, /exit or the end of input ends."""
    from foveal import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop
    )
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
    llm = session.load(model, settings)
    messages: list[dict[str, str]] = []
    while (line := _next_line()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages.clear()
        elif line.startswith("/"):
            print(f"foveal: no command {line.split()[0]} (only /reset and /exit)", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = session.write(llm.stream(llm.chat_prompt(messages), params))
            messages.append({"role": "assistant", "content": answer})


def _next_line() -> str | None:
    """What the user says next; None at the end of input. A terminal gets a prompt and line editing."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        import readline  # noqa: F401  (gives input() its line editing)

        return input("> ").strip()
    except EOFError:
        print()
        return None

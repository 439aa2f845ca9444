"""`foveal serve`: an OpenAI-compatible server."""

import os
import re
from typing import Annotated

import typer

from foveal.cli import options

_KEY_VARIABLE = "FOVEAL_API_KEY"
_SERVER = "Server"
_LIMITS = "Limits"
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(text: str) -> int:
    """512MiB, 2GiB, or a plain number of bytes."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMG]iB|)", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise typer.BadParameter(f"{text!r} is no size such as 512MiB, 2GiB or 1000000")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def serve(
    model: options.Model,
    host: Annotated[
        str, typer.Option(help="0.0.0.0: reachable from elsewhere.", rich_help_panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.", rich_help_panel=_SERVER)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar=_KEY_VARIABLE,
            show_envvar=True,
            help="Clients need this key; may be given several times. In the environment: separated by spaces.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; MODEL if not given.", rich_help_panel=_SERVER)
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of a prompt and its completion.", rich_help_panel=_LIMITS)
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Completions at a time.", rich_help_panel=_LIMITS)] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens a step.", rich_help_panel=_LIMITS)] = 2048,
    max_queued_requests: Annotated[
        int, typer.Option(min=0, help="Completions that may wait; more are refused.", rich_help_panel=_LIMITS)
    ] = 256,
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(parser=_bytes, metavar="SIZE", help="Of the cache, e.g. 2GiB.", rich_help_panel=_LIMITS),
    ] = None,
    adapter: options.Adapter = None,
    streaming: options.Streaming = None,
    seed: options.Seed = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    index_dtype: options.IndexDtype = "auto",
    kv_cache_dtype: options.KVCacheDtype = "auto",
    mla_form: options.MLAForm = "auto",
    quantization: options.Quantization = None,
) -> None:
    """Serve MODEL over HTTP with OpenAI's API. SIGTERM or Ctrl-C finishes what runs and ends; a second one stops."""
    unset = not api_key and _KEY_VARIABLE in os.environ  # a secret that did not arrive must not open the server
    if unset or any(not key.strip() for key in api_key or []):
        raise typer.BadParameter("a key must not be empty", param_hint=f"--api-key or {_KEY_VARIABLE}")
    if served_model_name == "":
        raise typer.BadParameter("a name must not be empty", param_hint="--served-model-name")
    try:
        from foveal.server.run import listen
        from foveal.server.run import serve as run
        from foveal.server.service import Service, Settings
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("foveal"):
            raise
        raise ValueError(f"foveal serve needs {error.name}: pip install 'foveal[serve]'") from None
    from foveal import LLM

    listener = listen(host, port)
    llm = LLM(
        model,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
        adapter=adapter,
        streaming=streaming,
        seed=seed or 0,
        device=device,
        dtype=dtype,
        index_dtype=index_dtype,
        kv_cache_dtype=kv_cache_dtype,
        mla_form=mla_form,
        quantization=quantization,
    )
    settings = Settings(
        model_name=served_model_name or model,
        api_keys=tuple(api_key or ()),
        max_num_seqs=max_num_seqs,
        max_queued_requests=max_queued_requests,
    )
    run(Service(llm, settings), listener)

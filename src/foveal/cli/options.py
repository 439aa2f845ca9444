"""Arguments and options that several commands share."""

from typing import Annotated

import typer

_SAMPLING = "Sampling"
_PRECISION = "Precision"

MODEL = "A directory, a .gguf file, a Hub id, or an alias: builtin, smollm2."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
MaxTokens = Annotated[int, typer.Option(min=1, help="Stop after this many tokens.", rich_help_panel=_SAMPLING)]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.", rich_help_panel=_SAMPLING)]
TopP = Annotated[
    float, typer.Option(help="Sample from the likeliest tokens that hold this share.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[int, typer.Option(help="Sample from this many tokens; 0: from all.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Stop before this text; may be given several times.", rich_help_panel=_SAMPLING),
]
Device = Annotated[str, typer.Option(help="cpu or cuda, cuda:1, ...", rich_help_panel=_PRECISION)]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32 or bfloat16.", rich_help_panel=_PRECISION)]
IndexDtype = Annotated[
    str, typer.Option(help="How index keys are cached: auto, fp8, int8 or bf16.", rich_help_panel=_PRECISION)
]
KVCacheDtype = Annotated[
    str, typer.Option("--kv-cache-dtype", help="How latents are cached: auto, bf16 or fp8.", rich_help_panel=_PRECISION)
]
MLAForm = Annotated[
    str,
    typer.Option(
        "--mla-form", help="How latents are attended to: auto, expanded or absorbed.", rich_help_panel=_PRECISION
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(help="Round the weights to int8 or int4 while they are loaded.", rich_help_panel=_PRECISION),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="Indexers for a dense model: the folder that foveal train wrote, or smollm2-indexers.",
        metavar="FOLDER",
        show_default=False,
    ),
]
Streaming = Annotated[
    str | None,
    typer.Option(
        metavar="SINKS+WINDOW",
        help="Attend to the first and the latest tokens alone, such as 4+1020: any length in a constant cache.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

"""`foveal plan`: what will long context cost? Answers from a config.json alone, without torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveal.cli import options

if TYPE_CHECKING:
    from foveal.config import ModelConfig
    from foveal.costs import Plan
    from foveal.costs.spectrum import LayerSpectrum

_DEVICE, _STORAGE, _OUTPUT = "Device", "Storage", "Output"


def plan(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="A config.json, a directory that holds one, or a built-in name such as glm-5."
        ),
    ],
    context: Annotated[int, typer.Option(help="Tokens of context.")] = 32768,
    compare: Annotated[bool, typer.Option("--compare", help="Several models or variants side by side.")] = False,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Exchange the attention: mha, gqa:8, mqa, mla, dsa:2048, window:4096, joined by +."),
    ] = None,
    streaming: options.Streaming = None,
    ranks: Annotated[
        bool, typer.Option("--ranks", help="Read the weights: how small a latent could hold keys and values.")
    ] = False,
    weights: Annotated[
        str,
        typer.Option(
            help="How weights are stored: auto, float32, bfloat16, fp8, int8, int4.", rich_help_panel=_STORAGE
        ),
    ] = "auto",
    kv_cache_dtype: Annotated[
        str,
        typer.Option("--kv-cache-dtype", help="How latents are cached: auto, bf16, fp8.", rich_help_panel=_STORAGE),
    ] = "auto",
    index_dtype: Annotated[
        str, typer.Option(help="How index keys are cached: auto, fp8, int8, bf16, float32.", rich_help_panel=_STORAGE)
    ] = "auto",
    page_size: Annotated[int, typer.Option(help="Tokens of a cache page.", rich_help_panel=_STORAGE)] = 64,
    device: Annotated[
        str, typer.Option(help="h100, h200, a100, rtx-4090, or measured: this machine.", rich_help_panel=_DEVICE)
    ] = "h100",
    devices: Annotated[
        int | None, typer.Option(help="How many (default: as few as hold it).", rich_help_panel=_DEVICE)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences at a time (default: as many as fit).", rich_help_panel=_DEVICE)
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of one device, in any currency.", rich_help_panel=_DEVICE)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_OUTPUT)] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.", rich_help_panel=_OUTPUT)] = None,
    png: Annotated[Path | None, typer.Option(help="Write the plots.", rich_help_panel=_OUTPUT)] = None,
) -> None:
    """Tell what MODEL costs at a context length: memory, arithmetic, time and money."""
    from foveal.costs import Request, find_device, make_plan

    configs = _configs(models, variant or [], compare)
    if streaming is not None:
        configs = [(f"{name} streaming {streaming}", _streaming(config, streaming)) for name, config in configs]
    _check_dtypes([config for _, config in configs], kv_cache_dtype, index_dtype)
    spectra = _spectra(models, variant or [], configs[0][1]) if ranks else None
    request = Request(
        context=context,
        device=find_device(device),
        batch=batch,
        weight_dtype=weights,
        kv_cache_dtype=kv_cache_dtype,
        index_dtype=index_dtype,
        page_tokens=page_size,
        devices=devices,
        price_per_hour=price_per_hour,
    )
    plans = [make_plan(name, config, request) for name, config in configs]
    if png is not None:
        from foveal.cli.plan_png import write_png

        write_png(plans, png)
    if html is not None:
        from foveal.cli.plan_page import page

        html.write_text(page(plans, spectra), encoding="utf-8")
    if as_json:
        print(json.dumps(_as_json(plans, spectra, compare)))
    else:
        from foveal.cli.plan_table import print_plans

        print_plans(plans, spectra)


def _configs(models: list[str], variants: list[str], compare: bool) -> list[tuple[str, "ModelConfig"]]:
    """Every model, followed by its variants where they are compared, replaced by its variant where they are not."""
    from foveal.costs import apply_variant

    if not compare and (len(models) > 1 or len(variants) > 1):
        raise ValueError(f"{', '.join(models + variants)}: several models or variants need --compare")
    if compare and len(models) + len(variants) < 2:
        raise ValueError(f"--compare needs something beside {models[0]}: another model, or a --variant")
    for given in (models, variants):
        if twice := next((name for place, name in enumerate(given) if name in given[:place]), None):
            raise ValueError(f"--compare was given {twice!r} twice")
    configs = []
    for model in models:
        config = _config(model)
        if compare or not variants:
            configs.append((model, config))
        configs.extend((f"{model} {variant}", apply_variant(config, variant)) for variant in variants)
    return configs


def _streaming(config: "ModelConfig", text: str) -> "ModelConfig":
    from foveal.config.streaming import read_streaming, with_streaming

    return with_streaming(config, *read_streaming(text))


def _config(model: str) -> "ModelConfig":
    """A built-in model, or what a config.json says."""
    from foveal.config import read_config
    from foveal.config.released import released, released_names

    if model in released_names():
        return read_config(released(model))
    path = _path(model)
    if path.suffix == ".gguf" or not path.exists():
        raise ValueError(
            f"no config {model!r}: MODEL is a config.json, a directory that holds one, or one of "
            f"{', '.join(released_names())}"
        )
    return read_config(path)


def _path(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:  # ~name of somebody who is not there
        return Path(model)


def _check_dtypes(configs: list["ModelConfig"], kv_cache_dtype: str, index_dtype: str) -> None:
    """Refuses a cache dtype that none of the models has a use for."""
    from foveal.config.model import MLAConfig

    families = " and ".join(dict.fromkeys(config.family for config in configs))
    blocks = [block for config in configs for block in config.blocks]
    if kv_cache_dtype != "auto" and not any(isinstance(block.operation, MLAConfig) for block in blocks):
        raise ValueError(f"kv_cache_dtype {kv_cache_dtype!r} is for latents, of which {families} has none")
    if index_dtype != "auto" and not any(block.indexer for block in blocks):
        raise ValueError(f"index_dtype {index_dtype!r} is for index keys, of which {families} has none")


def _spectra(models: list[str], variants: list[str], config: "ModelConfig") -> list["LayerSpectrum"]:
    from foveal.costs.spectrum import latent_spectrum

    path = _path(models[0])
    if len(models) > 1 or variants or not path.is_dir():
        raise ValueError(
            f"--ranks reads the weights of one model's directory, which {' '.join(models + variants)} is not"
        )
    return latent_spectrum(path, config)


def _as_json(plans: list["Plan"], spectra: list["LayerSpectrum"] | None, compare: bool) -> dict[str, object]:
    if compare:
        return {"plans": [plan.as_dict() for plan in plans]}
    record = plans[0].as_dict()
    if spectra is not None:
        record["latent_ranks"] = [spectrum.as_dict() for spectrum in spectra]
    return record

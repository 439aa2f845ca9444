"""From a model's name to a `Decoder` with its weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from foveal.cache.store import resolve_index_dtype
from foveal.config import ModelConfig
from foveal.config.model import MLAConfig
from foveal.config.streaming import read_streaming, with_streaming
from foveal.kernels import QUANTIZATIONS
from foveal.models.adapter import check_base, with_adapter
from foveal.models.decoder import Decoder, Options, quantise_layer
from foveal.models.gguf import open_gguf
from foveal.models.names import checkpoint_parts, checkpoint_tensors, part_tensors
from foveal.models.resolve import resolve_adapter, resolve_model
from foveal.models.weights import Checkpoint, check, fill, open_safetensors
from foveal.nn.linear import ExactLinear, Linear
from foveal.nn.mla import FORMS
from foveal.nn.moe import Experts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# Bytes of a quantised weight: a number, and of int4 its share of a scale and a low.
_QUANTISED_BYTES = {"int8": 1.0, "int4": 0.5 + 4 / 32}


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    index_dtype: str | torch.dtype = "auto",
    mla_form: str = "auto",
    quantization: str | None = None,
    adapter: str | Path | None = None,
    streaming: str | None = None,
) -> Decoder:
    """Load a model with its weights, in evaluation mode.

    path: a directory, a .gguf file, a Hub id or an alias (see `resolve_model`).
    dtype: of the weights; "auto" is the checkpoint's own, or bfloat16 where that is float16, which CPUs are slow at;
        a GGUF file's quantised weights become float32, so that they are not rounded twice.
    index_dtype: how index keys are cached: "auto", "fp8", "int8", "bf16" or "float32", or such a torch dtype.
    mla_form: how latent attention is computed: "auto" (the cheapest by arithmetic), "expanded" or "absorbed".
    quantization: "int8" or "int4" rounds the weights, part by part while they are read (see `Decoder.quantise`); None
        leaves them as they are. For the CPU, in float32 and bfloat16.
    adapter: a directory with indexers that were trained for this model, or the alias of those that the package has
        (see `resolve_adapter`); its attention layers become sparse.
    streaming: "4+1020" lets attention see the first 4 tokens and the last 1020 alone (`with_streaming`); None: all.

    Raises ValueError for anything that cannot be loaded as asked, naming it: an unknown model, dtype, device or form, a
    setting for a part that the model does not have, a config that is not supported, tensors that are damaged, missing,
    unexpected or mis-shaped, an adapter of another model, or too little memory.
    """
    target = usable_device(device)
    indexers = None if adapter is None else resolve_adapter(adapter)
    checkpoint = open_checkpoint(path, indexers, streaming)
    options = Options(_dtype(dtype, checkpoint), dtype_name(index_dtype), mla_form)
    _check_options(options, checkpoint.config)
    _check_quantization(quantization, options.dtype, target)
    with torch.device("meta"):  # shapes only, until it is known that everything fits
        decoder = Decoder(checkpoint.config, options)
    check(checkpoint_tensors(decoder), checkpoint.tensors)
    _check_memory(_needed_bytes(decoder, quantization), target)
    if quantization is None:
        decoder.to_empty(device=target)
        fill(checkpoint_tensors(decoder), checkpoint.tensors)
    else:
        _fill_quantised(decoder, checkpoint, quantization)
    if indexers is not None:
        check_base(decoder, indexers)
    return decoder.eval()


def _fill_quantised(decoder: Decoder, checkpoint: Checkpoint, quantization: str) -> None:
    """Read and round one part of the model after the other, so that only one lies in memory unrounded."""
    stored = {tensor.name: tensor for tensor in checkpoint.tensors}
    for prefix, part in checkpoint_parts(decoder):
        part.to_empty(device="cpu")
        views = part_tensors(decoder, prefix, part)
        fill(views, [stored[name] for name in views])
        for name, module in part.named_modules(prefix=prefix):
            quantise_layer(module, quantization, name)
    decoder.quantise_head(quantization)


def open_checkpoint(path: str | Path, adapter: str | Path | None = None, streaming: str | None = None) -> Checkpoint:
    """The config and the unread tensors of a model, whichever form it is stored in, and of its adapter. Raises as
    `load_model` does."""
    # First what can be said before a download.
    indexers = None if adapter is None else resolve_adapter(adapter)
    reach = None if streaming is None else read_streaming(streaming)
    found = resolve_model(str(path))
    checkpoint = open_safetensors(found) if found.is_dir() else open_gguf(found)
    checkpoint = checkpoint if indexers is None else with_adapter(checkpoint, indexers)
    return checkpoint if reach is None else replace(checkpoint, config=with_streaming(checkpoint.config, *reach))


def generation_defaults(path: str | Path) -> dict[str, Any]:
    """What the model's generation_config.json says; {} where it has none."""
    file = resolve_model(str(path)) / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        defaults = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(defaults, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return defaults


def _dtype(wanted: str | torch.dtype, checkpoint: Checkpoint) -> torch.dtype:
    if wanted == "auto":
        name = checkpoint.config.dtype
        wanted = "bfloat16" if name == "float16" else name
    if wanted in _DTYPES.values():
        assert isinstance(wanted, torch.dtype)
        return wanted
    if wanted not in _DTYPES:
        raise ValueError(f"dtype {wanted!r} is not supported (only auto, {', '.join(_DTYPES)})")
    return _DTYPES[str(wanted)]


def dtype_name(dtype: str | torch.dtype) -> str:
    """The name of a cache dtype that was given by name or as a torch dtype: float8_e4m3fn is "fp8"."""
    return "fp8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")


def _check_options(options: Options, config: ModelConfig) -> None:
    """Refuses unknown names, and settings that the model has no use for."""
    resolve_index_dtype(options.index_dtype, options.dtype)
    if options.index_dtype != "auto" and config.index_topk is None:
        raise ValueError(f"index_dtype {options.index_dtype!r} is for index keys, which {config.family} does not have")
    if options.mla_form not in FORMS:
        raise ValueError(f"mla_form must be one of {', '.join(FORMS)}, not {options.mla_form!r}")
    if options.mla_form != "auto" and not any(isinstance(block.operation, MLAConfig) for block in config.blocks):
        raise ValueError(f"mla_form {options.mla_form!r} is for latent attention, which {config.family} does not have")


def usable_device(wanted: str | torch.device) -> torch.device:
    """The device of this name. ValueError unless it is one that models run on, and this machine has it."""
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {wanted!r} is not one that torch knows: {error}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(wanted)!r} is not supported (only cpu and cuda)")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(wanted)!r} was asked for, but this machine has no usable CUDA device")
    if device.index and device.type == "cuda" and device.index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ValueError(f"device {str(wanted)!r} was asked for, but this machine's last CUDA device is cuda:{last}")
    return device


def _check_quantization(quantization: str | None, dtype: torch.dtype, device: torch.device) -> None:
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {quantization!r}")
    if device.type != "cpu":
        raise ValueError(f"quantization {quantization!r} is for the CPU, not for {device}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"quantization {quantization!r} goes with dtype float32 or bfloat16, not {dtype_name(dtype)}")


def _needed_bytes(decoder: Decoder, quantization: str | None) -> int:
    """Of the weights, once loaded; while quantising, of the largest part unrounded besides."""
    parameters = sum(parameter.nbytes for parameter in decoder.parameters())
    if quantization is None:
        return parameters
    rounded = [
        weight
        for module in decoder.modules()
        if isinstance(module, Linear | Experts) and not isinstance(module, ExactLinear)
        for weight in ((module.weight,) if isinstance(module, Linear) else (module.gate_up_proj, module.down_proj))
    ]
    numbers = sum(weight.numel() for weight in rounded)
    if decoder.config.tied_embeddings:
        numbers += decoder.embed_tokens.weight.numel()
    parts = (sum(parameter.nbytes for parameter in part.parameters()) for _, part in checkpoint_parts(decoder))
    unrounded = sum(weight.nbytes for weight in rounded)
    return parameters - unrounded + int(numbers * _QUANTISED_BYTES[quantization]) + max(parts)


def _check_memory(needed: int, device: torch.device) -> None:
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > available:
        raise ValueError(f"the weights need {_size(needed)}, but only {_size(available)} of memory are available")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

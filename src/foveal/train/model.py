"""The model of a run: how it begins, and what is written when it is done."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.config import ModelConfig, read_config
from foveal.config.indexers import with_indexers
from foveal.config.model import IndexerConfig, MLAConfig
from foveal.models.adapter import AdapterConfig, check_base, fingerprint, indexer_tensors, is_indexer, save_adapter
from foveal.models.decoder import Decoder, Options
from foveal.models.load import open_checkpoint
from foveal.models.names import checkpoint_tensors
from foveal.models.resolve import resolve_model
from foveal.models.save import save_model
from foveal.models.weights import check, fill
from foveal.train.initial import initialise, initialise_indexers
from foveal.train.schema import ModelSettings, RunSettings


@dataclass
class TrainedModel:
    """A decoder that learns, and what is known of where it came from."""

    decoder: Decoder
    raw_config: Mapping[str, Any] | None
    """config.json of the base; None: it has none (GGUF)."""
    base: str
    added: IndexerConfig | None
    """An indexer that the base does not have."""

    def check_savable(self, *, base_learned: bool, merge: bool) -> None:
        """ValueError where `save` could not write what such a run learns."""
        if self.raw_config is None and self._writes_model(base_learned, merge):
            raise ValueError(f"{self.base} has no config.json, so a model cannot be written, only an adapter")
        if merge and self.added is None:
            raise ValueError(f"merge: {self.base} gets no indexers from this recipe that could be merged")
        if merge and self.added is not None and self.raw_config is not None:
            merged_config(self.raw_config, self.decoder.config, self.added)

    def _writes_model(self, base_learned: bool, merge: bool) -> bool:
        # Indexers that the base has itself are a part of it.
        return merge or base_learned or self.added is None

    def save(self, run: RunSettings, tokenizer: Path, *, base_learned: bool, merge: bool) -> list[Path]:
        """Write what was learned: model/ where the base's weights or its own indexers changed or `merge` is asked
        for, and adapter/ for indexers that the base does not have. Returns what was written; OSError where that
        fails."""
        output, written = run.output, []
        apart = None if merge else self.added
        tensors = _stored(self.decoder, run.stored_dtype, as_adapter=apart is not None)
        if self._writes_model(base_learned, merge):
            assert self.raw_config is not None
            # Of the base's stored weights, not of those written.
            stored = ("torch_dtype", "quantization_config")
            config, kept = {key: value for key, value in self.raw_config.items() if key not in stored}, tensors
            if self.added is not None and merge:
                config = merged_config(config, self.decoder.config, self.added)
            elif self.added is not None:
                kept = {name: tensor for name, tensor in tensors.items() if not is_indexer(name)}
            save_model(kept, config, self.decoder.options.dtype, output / "model", tokenizer)
            written.append(output / "model")
        if apart is not None:
            indexers = {name: tensor for name, tensor in tensors.items() if is_indexer(name)}
            save_adapter(indexers, self._adapter(apart, output, base_learned), output / "adapter")
            written.append(output / "adapter")
        return written

    def _adapter(self, indexer: IndexerConfig, output: Path, base_learned: bool) -> AdapterConfig:
        return AdapterConfig(
            base_model=str(output / "model") if base_learned else self.base,
            base_fingerprint=fingerprint(self.decoder),
            heads=indexer.heads,
            head_dim=indexer.head_dim,
            topk=indexer.topk,
            rope_dim=indexer.rope.dim,
        )


def _stored(decoder: Decoder, dtype: str | None, *, as_adapter: bool) -> dict[str, Tensor]:
    """Every tensor as it is written: matrices in the dtype that is asked for, but for those that a model of that dtype
    has in float32 (in an adapter, which is to be small, indexers have none). What is small stays, and so does a
    fingerprint."""
    tensors = checkpoint_tensors(decoder)
    if dtype is None:
        return tensors
    wanted: torch.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        like = checkpoint_tensors(Decoder(decoder.config, Options(wanted)))
    narrow = {name for name, x in like.items() if x.dtype == wanted or (as_adapter and is_indexer(name))}
    return {name: x.to(wanted) if x.dim() > 1 and name in narrow else x for name, x in tensors.items()}


def begin(settings: ModelSettings, seed: int) -> TrainedModel:
    """The model that a recipe starts from. Raises ValueError as `load_model` and `with_indexers` do."""
    options = Options(
        dtype=getattr(torch, settings.dtype),
        index_dtype="bfloat16" if settings.dtype == "bfloat16" else "auto",
        checkpoint_activations=settings.checkpoint_activations,
    )
    if settings.config is not None:
        return _random(settings, options, seed)
    assert settings.start is not None
    folder = resolve_model(settings.start)
    checkpoint = open_checkpoint(settings.start, settings.adapter)
    config = _indexed(checkpoint.config, settings)
    decoder = Decoder(config, options)
    views, stored = checkpoint_tensors(decoder), {tensor.name for tensor in checkpoint.tensors}
    if settings.indexer is not None:
        initialise_indexers(decoder, seed)
        new = indexer_tensors(decoder).keys() - stored
        views = {name: view for name, view in views.items() if name not in new}
    check(views, checkpoint.tensors)
    fill(views, checkpoint.tensors)
    if settings.adapter is not None:
        check_base(decoder, settings.adapter)
    file = folder / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    added = first_indexer(config) if settings.indexer or settings.adapter else None
    return TrainedModel(decoder, raw, settings.start, added)


def first_indexer(config: ModelConfig) -> IndexerConfig | None:
    """The first layer's that has one."""
    return next((block.indexer for block in config.blocks if block.indexer), None)


def _random(settings: ModelSettings, options: Options, seed: int) -> TrainedModel:
    assert settings.config is not None
    config = _indexed(read_config(settings.config), settings)
    decoder = Decoder(config, options)
    initialise(decoder, seed)
    raw = json.loads(settings.config.read_text(encoding="utf-8"))
    added = first_indexer(config) if settings.indexer else None
    return TrainedModel(decoder, raw, str(settings.config), added)


def _indexed(config: ModelConfig, settings: ModelSettings) -> ModelConfig:
    if settings.indexer is None:
        return config
    given = settings.indexer
    return with_indexers(config, heads=given.heads, head_dim=given.head_dim, topk=given.topk, rope_dim=given.rope_dim)


def merged_config(raw: Mapping[str, Any], config: ModelConfig, indexer: IndexerConfig) -> dict[str, Any]:
    """config.json of a DeepSeek-V3 model whose indexers have become part of it: `deepseek_v32`.

    Raises ValueError for other families, whose sparse form has no standard name.
    """
    mixers = [block.operation for block in config.blocks if isinstance(block.operation, MLAConfig)]
    if config.family != "deepseek_v3" or any(mixer.q_lora_rank is None for mixer in mixers):
        raise ValueError(
            f"a sparse {config.family} has no standard config.json (only deepseek_v3 with a query latent can be merged)"
        )
    merged = {key: value for key, value in raw.items() if key not in ("architectures", "auto_map")}
    return merged | {
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
        "index_n_heads": indexer.heads,
        "index_head_dim": indexer.head_dim,
        "index_topk": indexer.topk,
    }

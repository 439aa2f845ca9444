"""The decoder: every model of this library, in one sitting."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from foveal.cache.layouts import BlockCache
from foveal.cache.store import CacheStore, resolve_index_dtype
from foveal.config import ModelConfig
from foveal.config.model import (
    BlockConfig,
    GatedDeltaConfig,
    GQAConfig,
    KDAConfig,
    LayerConfig,
    Mamba2Config,
    MambaConfig,
    MLAConfig,
    MLPConfig,
    MoEConfig,
    S4DConfig,
)
from foveal.kernels import QuantisedWeight, linear, pack_weight, quantise_weight, settle
from foveal.kernels.cpu.blocks import AnyBlock
from foveal.nn.batch import Batch
from foveal.nn.fused import Part, fuse
from foveal.nn.gated_delta import GatedDelta
from foveal.nn.gqa import GQA
from foveal.nn.indexer import Indexer
from foveal.nn.kda import KDA
from foveal.nn.linear import Linear
from foveal.nn.mamba import Mamba
from foveal.nn.mamba2 import Mamba2
from foveal.nn.mixer import Mixer
from foveal.nn.mla import MLA
from foveal.nn.mlp import MLP
from foveal.nn.moe import Experts, MoE
from foveal.nn.norm import RMSNorm
from foveal.nn.s4d import S4D
from foveal.nn.selectors import Selector
from foveal.nn.step import Step
from foveal.nn.watch import Sight, Watch


@dataclass(frozen=True)
class Options:
    """How a model is run, beyond its config."""

    dtype: torch.dtype = torch.float32
    index_dtype: str = "auto"
    """Index keys: auto, fp8, bf16 or float32."""
    mla_form: str = "auto"
    """auto (the cheapest by arithmetic), expanded or absorbed."""
    checkpoint_activations: bool = False
    """With gradients: keep the input of each layer alone, and compute the layer again in the backward pass."""


@dataclass(frozen=True)
class Output:
    """What a step returns."""

    logits_LV: Tensor
    """float32, the wanted rows."""
    collected: dict[str, list[Any]]
    """What the batch asked to collect, by layer: "selection" int32 [T, K] or None, "experts" int64 [T, A], "router"
    float32 [T, E] (logits)."""


class Decoder(nn.Module):
    """A stack of layers between an embedding and a head."""

    def __init__(self, config: ModelConfig, options: Options = Options()) -> None:
        super().__init__()
        self.config, self.options = config, options
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, options.dtype)
        self.layers = nn.ModuleList(Layer(layer, config, options) for layer in config.layers)
        self.norm = _norm(config, options)
        if not config.tied_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=options.dtype)
        self._packed_head: Tensor | QuantisedWeight | None = None
        self._parts: list[Part] = []
        """The layers for steps of few tokens, made by `pack`: the same blocks, several in one call."""

    def forward(self, ids_SN: Tensor) -> Tensor:
        """Logits, float32 [S, N, V], of sequences of equal length; int64 in. Differentiable."""
        return self.step(Batch.packed(ids_SN)).logits_LV.unflatten(0, ids_SN.shape)

    def step(self, batch: Batch, cache: CacheStore | None = None, watch: Watch | None = None) -> Output:
        """Compute a batch: keys and states go to the cache, where there is one."""
        x_TD, collected = self.trunk(batch, cache, watch)
        if batch.wanted_L is not None:
            x_TD = x_TD[batch.wanted_L]
        return Output(self.head(x_TD), collected)

    def trunk(
        self, batch: Batch, cache: CacheStore | None = None, watch: Watch | None = None
    ) -> tuple[Tensor, dict[str, list[Any]]]:
        """What `step` computes before the head: [T, D], and what was collected."""
        step = Step(batch, watch)
        x_TD = self.embed_tokens(batch.ids_T)
        if cache and self._parts and step.fusable:
            for part in self._parts:
                x_TD = part(x_TD, step, cache)
        else:
            for index, layer in enumerate(self.layers):
                if self.options.checkpoint_activations and torch.is_grad_enabled():
                    x_TD = _again(layer, x_TD, step)
                else:
                    x_TD = layer(x_TD, step, cache.layers[index] if cache else None)
        return x_TD, step.collected

    def head(self, x_LD: Tensor) -> Tensor:
        """Logits, float32 [L, V], of what `trunk` returned for some tokens."""
        x_LD = self.norm(x_LD)
        if not self.config.tied_embeddings:
            logits_LV: Tensor = self.lm_head(x_LD)
        else:
            logits_LV = linear(x_LD, self.embed_tokens.weight if self._packed_head is None else self._packed_head)
        return logits_LV.float()

    def pack(self) -> None:
        """Trade readable weights for faster ones, for inference: no more gradients, no more saving."""
        if self.config.tied_embeddings and self._packed_head is None:
            self._packed_head = pack_weight(self.embed_tokens.weight)
        for module in self.modules():
            if isinstance(module, Linear | Experts):
                module.pack()
        self._settle()
        self.fuse()

    def _settle(self) -> None:
        """What a step reads lies together, in large pages."""
        modules = [module for module in self.modules() if isinstance(module, Linear | Experts)]
        rounded = [weight for module in modules for weight in module.rounded]
        if isinstance(self._packed_head, QuantisedWeight):
            rounded.append(self._packed_head)
        settle([*self.parameters(), *(part for weight in rounded for part in weight.parts)])
        for weight in rounded:
            weight.forget_place()

    @property
    def fused(self) -> bool:
        """Whether steps of few tokens run neighbouring blocks as one call."""
        return bool(self._parts)

    def fuse(self) -> None:
        """Let them, wherever blocks can; to be called again when a block of a fused decoder has changed."""
        layers = [[block for block in layer.modules() if isinstance(block, Block)] for layer in self.layers]
        self._parts = fuse([[(block, block.fused()) for block in blocks] for blocks in layers])

    def quantise(self, quantization: str) -> None:
        """Round the weights to "int8" or "int4" (see `quantise_weight`), for inference, as `pack` does.

        All linear layers and experts but those of class `ExactLinear`. Embeddings stay as they are; a head that is tied
        to them reads a rounded copy. Raises ValueError, with the layer's name, where a weight cannot be rounded.
        """
        for name, module in self.named_modules():
            quantise_layer(module, quantization, name)
        self.quantise_head(quantization)

    def quantise_head(self, quantization: str) -> None:
        """The rounded copy of the embeddings, where they serve as the head."""
        if self.config.tied_embeddings:
            self._packed_head = quantise_weight(self.embed_tokens.weight, quantization)


def _again(layer: nn.Module, x_TD: Tensor, step: Step) -> Tensor:
    """A layer of which the input alone is kept: the backward pass computes it again. Nothing in it is random."""
    given = layer, x_TD, step, step.selection_TK
    out_TD: Tensor = checkpoint(_layer_again, *given, use_reentrant=False, preserve_rng_state=False)
    return out_TD


def _layer_again(layer: nn.Module, x_TD: Tensor, step: Step, selection_TK: Tensor | None) -> Tensor:
    """A layer that may run a second time, when the step's selection has long become a later layer's."""
    step.selection_TK = selection_TK
    out_TD: Tensor = layer(x_TD, step, None)
    return out_TD


class Layer(nn.Module):
    """A few residual blocks, usually a mixer and a feed-forward."""

    def __init__(self, layer: LayerConfig, config: ModelConfig, options: Options) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(block, config, options) for block in layer)

    def forward(self, x_TD: Tensor, step: Step, caches: list[BlockCache | None] | None) -> Tensor:
        """[T, D] -> [T, D]."""
        for place, block in enumerate(self.blocks):
            x_TD = block(x_TD, step, caches[place] if caches else None)
        return x_TD


class Block(nn.Module):
    """x + operation(norm(x)); a mixer may have an indexer beside it."""

    def __init__(self, block: BlockConfig, config: ModelConfig, options: Options) -> None:
        super().__init__()
        self.norm = _norm(config, options)
        self.operation = _operation(block, config, options)
        self.indexer: Indexer | Selector | None = _indexer(block, config, options) if block.indexer else None
        self.sparse = block.indexer is not None or block.shared_selection

    def fused(self) -> AnyBlock | None:
        """This block as the kernels take it, weights as they are now; None where they cannot run it as one call."""
        block = self._as_block()
        return block if block and block.fusable else None

    def _as_block(self) -> AnyBlock | None:
        operation, norm, indexer = self.operation, self.norm, self.indexer
        if isinstance(operation, GQA | MLA) and not isinstance(indexer, Selector):
            return operation.fused(norm, sparse=self.sparse, indexer=indexer.fused() if indexer else None)
        if isinstance(operation, MLP | MoE | Mamba | Mamba2 | GatedDelta | KDA):
            return operation.fused(norm)
        return None

    def forward(self, x_TD: Tensor, step: Step, cache: BlockCache | None) -> Tensor:
        """[T, D] -> [T, D]."""
        h_TD = self.norm(x_TD)
        if isinstance(self.operation, Mixer):
            return x_TD + self._mix(h_TD, step, cache)
        if isinstance(self.operation, MoE):
            out_TD, routing = self.operation(h_TD)
            step.collect("experts", routing.chosen_TA)
            step.collect("router", routing.logits_TE)
            return x_TD + out_TD
        return x_TD + self.operation(h_TD)

    def _mix(self, h_TD: Tensor, step: Step, cache: BlockCache | None) -> Tensor:
        assert isinstance(self.operation, Mixer)
        latent_TX = self.operation.query_latent(h_TD)
        if self.indexer is not None:
            step.selection_TK = self.indexer(h_TD, latent_TX, step, cache)
        selection_TK = step.selection_TK if self.sparse else None
        if self.sparse:
            step.collect("selection", selection_TK)
        out_TD: Tensor = self.operation(h_TD, latent_TX, step, cache, selection_TK)
        if step.watch is not None and self.indexer is not None:
            assert step.glance and step.gaze
            step.watch(Sight(step.glance, step.gaze, step.queries, selection_TK))
        return out_TD


def quantise_layer(module: nn.Module, quantization: str, name: str) -> None:
    """Round the module's own weights, not those of modules in it; errors tell its name."""
    if isinstance(module, Linear | Experts):
        try:
            module.quantise(quantization)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


class Embedding(nn.Module):
    """Token embeddings [V, D]."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype))

    def forward(self, ids_T: Tensor) -> Tensor:
        """int64 [T] -> [T, D]."""
        return embedding(ids_T, self.weight)


def _norm(config: ModelConfig, options: Options) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.norm_eps, dtype=options.dtype, centred=config.centred_norms)


def _operation(block: BlockConfig, config: ModelConfig, options: Options) -> nn.Module:
    operation, hidden, eps, dtype = block.operation, config.hidden_size, config.norm_eps, options.dtype
    if isinstance(operation, GQAConfig):
        return GQA(operation, hidden, eps, dtype)
    if isinstance(operation, MLAConfig):
        return MLA(operation, hidden, dtype, options.mla_form)
    if isinstance(operation, S4DConfig):
        return S4D(operation, hidden, dtype)
    if isinstance(operation, MambaConfig):
        return Mamba(operation, hidden, eps, dtype)
    if isinstance(operation, Mamba2Config):
        return Mamba2(operation, hidden, eps, dtype)
    if isinstance(operation, GatedDeltaConfig):
        return GatedDelta(operation, hidden, eps, dtype)
    if isinstance(operation, KDAConfig):
        return KDA(operation, hidden, eps, dtype)
    if isinstance(operation, MoEConfig):
        return MoE(operation, hidden, dtype)
    assert isinstance(operation, MLPConfig)
    return MLP(hidden, operation.hidden, operation.activation, bias=operation.bias, dtype=dtype)


def _indexer(block: BlockConfig, config: ModelConfig, options: Options) -> Indexer:
    assert block.indexer is not None
    stored = resolve_index_dtype(options.index_dtype, options.dtype)
    return Indexer(block.indexer, config.hidden_size, options.dtype, stored)

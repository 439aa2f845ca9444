"""Choosing a latent rank: how much of the keys' and values' weights a few directions hold, layer by layer."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foveal.config import ModelConfig, weight_names
from foveal.config.model import GQAConfig, MLAConfig
from foveal.costs.tensors import Array, Tensors
from foveal.costs.variants import latent_rope_dim

SHARES = (0.90, 0.95, 0.99, 0.999)


@dataclass(frozen=True)
class LayerSpectrum:
    """The singular values of one layer's [K; V] weights."""

    layer: int
    numbers: int
    """What the cache holds of a token now: 2 G P for per-head keys and values, C + R for a latent and its rope key."""
    rope_key: int
    """What it would hold beside a latent: R, for per-head keys as `--variant mla` makes it."""
    energy: tuple[float, ...]
    """Squared singular values over their sum, falling."""

    def rank(self, share: float) -> int:
        """The fewest directions that keep `share` of the energy: the squared error of the best approximation of rank r
        is what is left out (Eckart and Young, 1936)."""
        kept = np.cumsum(self.energy)
        return min(int(np.searchsorted(kept, share - 1e-12)) + 1, len(self.energy))

    def saved(self, share: float) -> float:
        """Share of the cache that a latent of that rank and its rope key save; below 0 where they would hold more."""
        return 1 - (self.rank(share) + self.rope_key) / self.numbers

    def as_dict(self) -> dict[str, object]:
        """The ranks in plain types, for JSON; the share of energy is the key."""
        ranks = {str(share): {"rank": self.rank(share), "cache_saved": self.saved(share)} for share in SHARES}
        sizes = {"layer": self.layer, "numbers": self.numbers, "rope_key": self.rope_key}
        return sizes | {"ranks": ranks, "energy": list(self.energy)}


def latent_spectrum(directory: Path, config: ModelConfig) -> list[LayerSpectrum]:
    """The spectra of all layers that attend.

    For per-head attention of W_K stacked on W_V, [2 G P, D]; for MLA of its expansion, [H (P + V), C]. Weights alone
    say how keys and values could be compressed for inputs of any direction; real hidden states are not spread evenly,
    so that fewer directions may do. Raises ValueError for a model without attention, and for missing or damaged
    weights.
    """
    tensors = Tensors(directory, config.fp8_blocks)
    spectra = []
    for index, layer in enumerate(config.layers):
        for block in layer:
            if isinstance(block.operation, GQAConfig | MLAConfig):
                energy = _energy(_weights(tensors, config, index, block.operation), index)
                spectra.append(LayerSpectrum(index, *_cached(block.operation), tuple(energy.tolist())))
    if not spectra:
        raise ValueError(f"{config.family} has no attention layers whose keys and values could share a latent")
    return spectra


def _weights(tensors: Tensors, config: ModelConfig, layer: int, mixer: GQAConfig | MLAConfig) -> Array:
    names = weight_names(config.family)
    kind = "gqa" if isinstance(mixer, GQAConfig) else "mla"
    at = f"{names.layer.format(layer)}.{names.operations[kind]}"
    if isinstance(mixer, MLAConfig):
        return tensors.read(f"{at}.kv_b_proj.weight")
    keys, values = (tensors.read(f"{at}.{part}_proj.weight") for part in ("k", "v"))
    return np.concatenate((keys, values))


def _cached(mixer: GQAConfig | MLAConfig) -> tuple[int, int]:
    """Numbers that the cache holds of a token now, and those of a rope key beside a latent."""
    if isinstance(mixer, MLAConfig):
        return mixer.kv_lora_rank + mixer.rope_dim, mixer.rope_dim
    return 2 * mixer.kv_heads * mixer.head_dim, latent_rope_dim(mixer.head_dim)


def _energy(weight_XD: Array, layer: int) -> NDArray[np.float64]:
    """Squared singular values over their sum: eigenvalues of the smaller of W W^T and W^T W, in float64."""
    wide = weight_XD.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(f"layer {layer}: the weights of keys and values are not all numbers")
    squares = np.linalg.eigvalsh(wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide)[::-1]
    squares = squares.clip(min=0)
    if squares.sum() == 0:
        raise ValueError(f"layer {layer}: the weights of keys and values are all zero")
    return squares / squares.sum()

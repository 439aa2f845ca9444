"""Rotary position settings from both spellings of a config: transformers v4 (`rope_theta`, `rope_scaling`) and v5
(`rope_parameters`)."""

import math
from typing import Any, cast

from foveal.config.fields import Fields, is_number
from foveal.config.model import RopeConfig, RopeKind, RopeScaling

_KEYS = {
    "default": set[str](),
    # Both stretch what max_position_embeddings says; the original length is only stated, as in transformers.
    "linear": {"factor", "original_max_position_embeddings"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",
    },
}
_MOST_STRETCHED = 1_000_000  # times; beyond that a factor is a mistake
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(fields: Fields, dim: int, *, interleaved: bool = False, partial: float | None = None) -> RopeConfig:
    """The rotary embedding of `dim` dimensions that the config asks for.

    `partial`: the family turns a share of them, this one where the config names none; None: it turns all, and another
    share is refused. Raises ValueError for a kind, key or value that is not supported.
    """
    if partial is not None:
        dim = int(dim * _share(fields, partial))
    if dim < 2 or dim % 2:
        raise ValueError(f"config.json: rotary embedding needs an even number of dimensions, not {dim}")
    settings = rope_settings(fields, partial=partial is not None)
    default_theta = fields.number("rope_theta", 10000.0)
    theta = settings["rope_theta"] or default_theta
    if theta <= 0:
        raise ValueError(f"config.json: 'rope_theta' must be above 0, not {theta}")
    max_positions = fields.positive("max_position_embeddings")
    original = fields.positive_or_null("original_max_position_embeddings")
    scaling = _scaling(settings, max_positions, original or settings.get("original_max_position_embeddings"))
    return RopeConfig(dim=dim, theta=theta, interleaved=interleaved, scaling=scaling)


def _share(fields: Fields, default: float) -> float:
    """The share of dimensions that are turned, whichever place names it."""
    dictionaries = (fields.raw, fields.mapping("rope_scaling"), fields.mapping("rope_parameters"))
    fields.skip("partial_rotary_factor")
    shares = [share for named in dictionaries if (share := named.get("partial_rotary_factor")) is not None] or [default]
    if any(share != shares[0] for share in shares) or not is_number(shares[0]) or not 0 < shares[0] <= 1:
        raise ValueError(f"config.json: 'partial_rotary_factor' must be one number up to 1, not {shares}")
    return float(shares[0])


def rope_settings(fields: Fields, *, partial: bool = False) -> dict[str, Any]:
    """The config's rope dictionary, with `rope_theta` None where it has none.

    Where both spellings are there, the scaling is that of the one which scales, and theta that of the one which has it.
    Unless `partial`, a share of dimensions that are turned is refused.
    """
    if not partial and fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json: 'partial_rotary_factor' = {fields.raw['partial_rotary_factor']} is not supported"
        )
    old, new = (_settings(fields, name, partial=partial) for name in ("rope_scaling", "rope_parameters"))
    both = (old, new) if _kind(old) != "default" else (new, old)
    scaling, other = both
    contradicts = _kind(other) != "default" and _scaling_keys(old) != _scaling_keys(new)
    if contradicts or len({theta for theta in map(_theta, both) if theta}) > 1:
        raise ValueError(f"config.json: 'rope_scaling' = {old} contradicts 'rope_parameters' = {new}")
    return scaling | {"rope_theta": _theta(scaling) or _theta(other)}


def _settings(fields: Fields, name: str, *, partial: bool) -> dict[str, Any]:
    """One spelling's dictionary, without nulls; refuses what is not supported."""
    settings = {key: value for key, value in fields.mapping(name).items() if value is not None}
    kind = _kind(settings)
    if kind not in _KEYS:
        raise ValueError(f"config.json: {name} type {kind!r} is not supported (only {', '.join(_KEYS)})")
    if any(isinstance(value, dict) for value in settings.values()):
        raise ValueError(f"config.json: {name} by layer type is not supported: {sorted(settings)}")
    # An unscaled rope keeps leftovers of others in some released files; with no factor they say nothing.
    unknown = sorted(settings.keys() - _KEYS[kind] - _COMMON)
    if unknown and kind != "default":
        raise ValueError(f"config.json: {name} key '{unknown[0]}' is not supported for type {kind!r}")
    for key in sorted(settings.keys() & (_KEYS[kind] | {"rope_theta"})):
        if not is_number(settings[key]) and not (key in ("truncate", "finetuned") and isinstance(settings[key], bool)):
            raise ValueError(f"config.json: {name} key '{key}' must be a number, not {settings[key]!r}")
    if not partial and settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json: {name} key 'partial_rotary_factor' = {settings['partial_rotary_factor']} is not supported"
        )
    return settings


def _theta(settings: dict[str, Any]) -> float | None:
    return float(settings["rope_theta"]) if settings.get("rope_theta") else None


def _scaling_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """What says how rope is scaled, in one spelling."""
    return {key: settings[key] for key in settings.keys() - _COMMON} | {"rope_type": _kind(settings)}


def mscale_scale(settings: dict[str, Any], factor: float) -> float:
    """What DeepSeek's models multiply the softmax scale with: m^2, m = 0.1 * mscale_all_dim * ln(factor) + 1
    (DeepSeek-V3 `inference/model.py`); 1 where rope is unscaled or `mscale_all_dim` is absent."""
    if _kind(settings) == "default" or not settings.get("mscale_all_dim"):
        return 1.0
    return _mscale(factor, settings["mscale_all_dim"]) ** 2


def _kind(settings: dict[str, Any]) -> str:
    return str(settings.get("rope_type") or settings.get("type") or "default")


def _scaling(settings: dict[str, Any], max_positions: int, original: int | None) -> RopeScaling:
    kind = cast(RopeKind, _kind(settings))
    if kind == "default":
        return RopeScaling()
    factor = settings.get("factor")
    if factor is None and kind == "yarn" and original:
        factor = max_positions / original
    if not isinstance(factor, int | float) or not 1 <= factor <= _MOST_STRETCHED:
        raise ValueError(
            f"config.json: rope type {kind!r} needs a factor of at least 1 (at most {_MOST_STRETCHED}), not {factor!r}"
        )
    factor = float(factor)
    if kind == "linear":
        return RopeScaling(kind, factor)
    if kind == "dynamic":
        return RopeScaling(kind, factor, original_max_positions=max_positions)
    original = int(original or max_positions)
    if original < 1:
        raise ValueError(f"config.json: 'original_max_position_embeddings' must be above 0, not {original}")
    if kind == "llama3":
        low, high = (settings.get(name) for name in ("low_freq_factor", "high_freq_factor"))
        if low is None or high is None or low >= high:
            raise ValueError(f"config.json: rope type 'llama3' needs low_freq_factor < high_freq_factor: {settings}")
        return RopeScaling(kind, factor, original, low_freq_factor=float(low), high_freq_factor=float(high))
    assert kind == "yarn"
    return RopeScaling(
        kind,
        factor,
        original,
        beta_fast=float(settings.get("beta_fast") or 32),
        beta_slow=float(settings.get("beta_slow") or 1),
        attention_factor=_attention_factor(settings, factor),
        truncate=bool(settings.get("truncate", True)),
    )


def _attention_factor(settings: dict[str, Any], factor: float) -> float:
    """Yarn's factor on cos and sin (arXiv 2309.00071, section 3.4); DeepSeek's two mscales divide each other."""
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

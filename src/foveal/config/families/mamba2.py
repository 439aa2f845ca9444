"""Mamba-2: state space duality only, one residual block a layer."""

import math

from foveal.config.families import mamba
from foveal.config.fields import Fields
from foveal.config.model import Mamba2Config, ModelConfig

NAMES = mamba.NAMES


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(eos_token_id=2)
    fields.expect("norm_before_gate", False)
    fields.expect("rms_norm", True)
    fields.skip("time_step_rank", "chunk_size")  # nothing reads the one; the other is how it is computed
    return mamba.recurrent_model(fields, _mamba2(fields))


def _mamba2(fields: Fields) -> Mamba2Config:
    heads, head_dim = fields.positive("num_heads", 128), fields.positive("head_dim", 64)
    groups, inner = fields.positive("n_groups", 8), fields.positive("expand", 2) * fields.positive("hidden_size")
    if heads * head_dim != inner or heads % groups:
        raise ValueError(
            f"config.json: {heads} heads of {head_dim} in {groups} groups do not make expand x hidden_size = {inner}"
        )
    # Infinity as JSON has no word for it: Python's own, or transformers v5's.
    limit = fields.get("time_step_limit", [0.0, math.inf])
    if limit not in ([0.0, math.inf], [0.0, {"__float__": "Infinity"}], (0.0, math.inf)):
        raise ValueError(f"config.json: 'time_step_limit' = {limit!r} is not supported for mamba2 (only none)")
    return Mamba2Config(
        heads=heads,
        head_dim=head_dim,
        state=fields.positive("state_size", 128),
        groups=groups,
        conv=fields.positive("conv_kernel", 4),
        conv_bias=fields.flag("use_conv_bias", True),
        proj_bias=fields.flag("use_bias"),
    )

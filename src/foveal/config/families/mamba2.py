"""Mamba-2: state space duality only, one residual block a layer."""

import math

from foveal.config.families import common, mamba
from foveal.config.fields import Fields, is_number
from foveal.config.model import Mamba2Config, ModelConfig

NAMES = mamba.NAMES


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(eos_token_id=2)
    fields.expect("rms_norm", True)
    # Codestral states the norm the other way round; transformers gates first, whatever it says.
    fields.skip("norm_before_gate")
    fields.skip("time_step_rank", "chunk_size")  # nothing reads the one; the other is how it is computed
    return mamba.recurrent_model(fields, _mamba2(fields))


def _mamba2(fields: Fields) -> Mamba2Config:
    heads, head_dim = fields.positive("num_heads", 128), fields.positive("head_dim", 64)
    groups, inner = fields.positive("n_groups", 8), fields.positive("expand", 2) * fields.positive("hidden_size")
    if heads * head_dim != inner or heads % groups:
        raise ValueError(
            f"config.json: {heads} heads of {head_dim} in {groups} groups do not make expand x hidden_size = {inner}"
        )
    return Mamba2Config(
        heads=heads,
        head_dim=head_dim,
        state=fields.positive("state_size", 128),
        groups=groups,
        conv=fields.positive("conv_kernel", 4),
        conv_bias=fields.flag("use_conv_bias", True),
        proj_bias=fields.flag("use_bias"),
        activation=common.activation(fields),
        dt_limits=_dt_limits(fields),
    )


def _dt_limits(fields: Fields) -> tuple[float, float] | None:
    """The bounds of time steps; None where they bound nothing."""
    stated = fields.get("time_step_limit", [0.0, math.inf])
    bounds = stated if isinstance(stated, list | tuple) else []
    # JSON has no word for infinity: Python's own, or transformers v5's.
    limits = [math.inf if bound in (math.inf, {"__float__": "Infinity"}) else bound for bound in bounds]
    if len(limits) != 2 or not all(bound == math.inf or is_number(bound) for bound in limits):
        raise ValueError(f"config.json: 'time_step_limit' must be two numbers, not {stated!r}")
    least, most = map(float, limits)
    return None if (least, most) == (0.0, math.inf) else (least, most)

"""Mamba-1: selective state spaces only, one residual block a layer. Read for `foveal plan`; not run yet."""

import math

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import BlockConfig, MambaConfig, ModelConfig

NAMES = common.WeightNames(
    embedding="backbone.embeddings",
    final_norm="backbone.norm_f",
    layer="backbone.layers.{}",
    norms=("norm",),
    operations={"mamba": "mixer"},
)
# A state does not grow with the sequence, and nothing counts positions.
_NO_LIMIT = 1 << 30


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        rms_norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        max_position_embeddings=_NO_LIMIT,
    )
    fields.expect("rms_norm", True)
    # How it was initialised and trained, and the names of the sizes in the first release.
    fields.skip("residual_in_fp32", "rescale_prenorm_residual", "fused_add_norm", "pad_vocab_size_multiple")
    fields.skip("d_model", "d_inner", "n_layer", "ssm_cfg")
    fields.skip(*(f"time_step_{part}" for part in ("scale", "min", "max", "init_scheme", "floor")))
    layer = (BlockConfig(_mamba(fields)),)
    return common.model(fields, (layer,) * fields.positive("num_hidden_layers"))


def _mamba(fields: Fields) -> MambaConfig:
    hidden = fields.positive("hidden_size")
    inner = fields.positive("expand", 2) * hidden
    fields.expect("hidden_act", "silu")
    fields.expect("intermediate_size", inner)
    rank = fields.get("time_step_rank", "auto")
    return MambaConfig(
        inner=inner,
        state=fields.positive("state_size", 16),
        conv=fields.positive("conv_kernel", 4),
        dt_rank=math.ceil(hidden / 16) if rank == "auto" else fields.positive("time_step_rank"),
        conv_bias=fields.flag("use_conv_bias", True),
        proj_bias=fields.flag("use_bias"),
        norms=False,
    )

"""Mamba-1: selective state spaces only, one residual block a layer."""

import math

from foveal.config.families import common
from foveal.config.fields import Fields
from foveal.config.model import BlockConfig, Mamba2Config, MambaConfig, ModelConfig

NAMES = common.WeightNames(
    embedding="backbone.embeddings",
    final_norm="backbone.norm_f",
    layer="backbone.layers.{}",
    norms=("norm",),
    operations={"mamba": "mixer", "mamba2": "mixer"},
    spellings=((r"^backbone\.embedding\.", "backbone.embeddings."),),  # state-spaces' own
)
# A state does not grow with the sequence, and nothing counts positions.
_NO_LIMIT = 1 << 30


def read(fields: Fields) -> ModelConfig:
    """See `foveal.config.read_config`."""
    fields.default(eos_token_id=0, tie_word_embeddings=True)
    fields.expect("rms_norm", True)
    fields.skip("fused_add_norm", "pad_vocab_size_multiple")
    fields.skip("d_model", "d_inner", "n_layer", "ssm_cfg")  # the sizes' names in the first release
    return recurrent_model(fields, _mamba(fields))


def recurrent_model(fields: Fields, mixer: MambaConfig | Mamba2Config) -> ModelConfig:
    """Layers of nothing but `mixer`, as the Mamba families spell it."""
    fields.default(
        bos_token_id=0,
        rms_norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        max_position_embeddings=_NO_LIMIT,
    )
    # How it was initialised and trained.
    fields.skip("residual_in_fp32", "rescale_prenorm_residual", "time_step_min", "time_step_max", "time_step_floor")
    fields.skip("time_step_scale", "time_step_init_scheme")
    fields.expect("intermediate_size", mixer.inner)
    return common.model(fields, ((BlockConfig(mixer),),) * fields.positive("num_hidden_layers"))


def _mamba(fields: Fields) -> MambaConfig:
    hidden = fields.positive("hidden_size")
    inner = fields.positive("expand", 2) * hidden
    rank = fields.get("time_step_rank", "auto")
    return MambaConfig(
        inner=inner,
        state=fields.positive("state_size", 16),
        conv=fields.positive("conv_kernel", 4),
        dt_rank=math.ceil(hidden / 16) if rank == "auto" else fields.positive("time_step_rank"),
        conv_bias=fields.flag("use_conv_bias", True),
        proj_bias=fields.flag("use_bias"),
        norms=False,
        activation=common.activation(fields),
    )

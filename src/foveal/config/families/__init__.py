"""The model families, one file each. A new family is a new file and a line here."""

from types import ModuleType

from foveal.config.families import (
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    glm_moe_dsa,
    jamba,
    kimi_linear,
    llama,
    mamba,
    mamba2,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_next,
)

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v32": deepseek_v32,
    "glm_moe_dsa": glm_moe_dsa,
    "jamba": jamba,
    "qwen3_next": qwen3_next,
    "kimi_linear": kimi_linear,
    "mamba": mamba,
    "mamba2": mamba2,
}

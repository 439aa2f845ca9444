"""Hugging Face transformers as the other side of a comparison: the same weights in another implementation."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def load_transformers(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint at `path` (a directory or a .gguf file, which is dequantised) as a transformers model."""
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    return _from_gguf(path, dtype)


def _from_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """What `from_pretrained(gguf_file=...)` does, without the package `accelerate` that it insists on."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise ValueError(f"{path}: missing {missing}, unexpected {unexpected}")
    return model.eval()

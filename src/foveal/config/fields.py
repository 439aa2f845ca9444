"""Reading config.json so that nothing in it goes unnoticed."""

from collections.abc import Mapping
from typing import Any

# Fields that do not change what the model computes from token ids. A field that is in neither this list nor read by the
# family is refused (unless it is empty): ignoring it could change results without a word.
INERT = frozenset(
    [
        "architectures",
        "model_type",
        "auto_map",
        "transformers_version",
        "transformers.js_config",
        "torch_dtype",
        "dtype",
        "use_cache",
        "initializer_range",
        "name_or_path",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "cls_token_id",
        "mask_token_id",
        "unk_token_id",
        "tokenizer_class",
        "prefix",
        "task_specific_params",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "return_dict",
        "return_dict_in_generate",
        "output_hidden_states",
        "output_attentions",
        "output_scores",
        "output_router_logits",
        "torchscript",
        "use_bfloat16",
        "pruned_heads",
        "is_decoder",
        "is_encoder_decoder",
        "add_cross_attention",
        "tie_encoder_decoder",
        "cross_attention_hidden_size",
        "chunk_size_feed_forward",
        "finetuning_task",
        "tf_legacy_loss",
        "early_stopping",
        "max_length",
        "min_length",
        "do_sample",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "attention_dropout",
        "hidden_dropout",
        "resid_dropout",
        "embd_dropout",
        "hidden_dropout_prob",
        "dropout",
        "router_aux_loss_coef",
        "aux_loss_alpha",
        "aux_loss_coef",
        "seq_aux",
        "router_jitter_noise",
        "router_z_loss_coef",
        "z_loss_coef",
        "ep_size",
        "pretraining_tp",
        "expert_aux_loss",
        "index_share_for_mtp_iteration",
        "use_mamba_kernels",
        "use_mambapy",
        "use_associative_scan",
        "mamba_ssm_dtype",
        "is_llama_config",
        "unsloth_fixed",
        "unsloth_version",
        "attn_implementation",
        "use_flash_attn",
        "use_flash_attention",
        "flash_attention",
        "attention_implementation",
        "num_logits_to_keep",
        "calc_logits_for_entire_prompt",
    ]
)


class Fields:
    """The fields of one config.json; remembers which were read."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = dict(raw)
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, or `default` where it is absent or null."""
        self._read.add(name)
        value = self.raw.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """The field's value; ValueError where it is absent or null."""
        value = self.get(name)
        if value is None:
            raise ValueError(f"config.json lacks '{name}', which a {self.family} model needs")
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self.need(name) if default is None else self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json: '{name}' must be a whole number above 0, not {value!r}")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """ValueError unless the field is absent, null or one of `allowed`."""
        value = self.get(name)
        if value is not None and value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ValueError(f"config.json: '{name}' = {value!r} is not supported for {self.family} (only {choices})")

    def skip(self, *names: str) -> None:
        """Mark fields as seen: they say again what other fields say."""
        self._read.update(names)

    @property
    def family(self) -> str:
        """The config's `model_type`."""
        return str(self.raw.get("model_type"))

    def finish(self) -> None:
        """ValueError naming the fields that nothing has read, may change results, and are not empty."""
        unknown = sorted(
            name
            for name, value in self.raw.items()
            if name not in self._read and name not in INERT and not name.startswith("_") and _says_something(value)
        )
        if unknown:
            named = ", ".join(f"'{name}' = {self.raw[name]!r}" for name in unknown)
            raise ValueError(
                f"config.json: {named} not supported for {self.family}: it may change results. "
                "If it does not, remove it from config.json"
            )


def _says_something(value: Any) -> bool:
    return value not in (None, False, "", [], {}, 0)

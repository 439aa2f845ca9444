"""Reading config.json so that nothing in it goes unnoticed."""

import math
from collections.abc import Mapping
from typing import Any

# Fields that do not change what the model computes from token ids. A field that is in neither this list nor read by the
# family is refused, unless it is empty or known to be off: ignoring it could change results without a word.
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
        "max_sequence_length",
        "n_ctx",
        "seq_length",
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
        "attention_probs_dropout_prob",
        "classifier_dropout",
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
# Switches that some configs turn off in families that never had them on. Turned on, they are refused; a bias that is
# there all the same is found among the weights.
OFF = frozenset(
    [
        "attention_bias",
        "gradient_checkpointing",
        "load_in_4bit",
        "load_in_8bit",
        "mlp_bias",
        "rope_interleaved",
        "use_bias",
        "use_mrope",
        "use_qk_norm",
        "use_sliding_window",
    ]
)
# No model is near these; a number beyond them is a mistake that would take all memory, or hours, before it shows.
_MOST = {
    "num_hidden_layers": 10_000,
    "num_experts": 100_000,
    "num_local_experts": 100_000,
    "n_routed_experts": 100_000,
}
_MOST_ELSE = (1 << 31) - 1


class Fields:
    """The fields of one config.json; remembers which were read."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = dict(raw)
        self._read: set[str] = set()

    def default(self, **values: Any) -> None:
        """What the family's fields are where the config leaves them out (a null stays null)."""
        self.raw = values | self.raw

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

    def need_or_null(self, name: str) -> Any:
        """The field's value, None where it is null; ValueError where it is absent."""
        return self.get(name) if name in self.raw else self.need(name)

    def positive(self, name: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self.need(name) if default is None else self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json: '{name}' must be a whole number above 0, not {value!r}")
        return _believable(name, value)

    def positive_or_null(self, name: str) -> int | None:
        """A whole number above zero; None where the field is absent or null."""
        return None if self.get(name) is None else self.positive(name)

    def whole(self, name: str, default: int) -> int:
        """A whole number, not below zero."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"config.json: '{name}' must be a whole number, not {value!r}")
        return _believable(name, value)

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.get(name, default)
        if not is_number(value):
            raise ValueError(f"config.json: '{name}' must be a number, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or False."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: '{name}' must be true or false, not {value!r}")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """A dictionary; {} where the field is absent or null."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise ValueError(f"config.json: '{name}' must be an object, not {value!r}")
        return dict(value)

    def names(self, name: str) -> list[str]:
        """A list of strings; [] where the field is absent or null."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise ValueError(f"config.json: '{name}' must be a list of strings, not {value!r}")
        return list(value)

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
            if name not in self._read
            and name not in INERT
            and not name.startswith("_")
            and _says_something(name, value)
        )
        if unknown:
            named = ", ".join(f"'{name}' = {self.raw[name]!r}" for name in unknown)
            raise ValueError(
                f"config.json: {named} not supported for {self.family}: it may change results. "
                "If it does not, remove it from config.json"
            )


def is_number(value: object) -> bool:
    """Whether JSON's `value` is a finite number (Python reads NaN and Infinity as numbers, too)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _believable(name: str, value: int) -> int:
    most = _MOST.get(name, _MOST_ELSE)
    if value > most:
        raise ValueError(f"config.json: '{name}' must not be above {most}; it is {_shown(value)}")
    return value


def _shown(value: int) -> str:
    """A whole number that may have thousands of digits."""
    return str(value) if value < 10**18 else "a number above 10^18"


def _says_something(name: str, value: Any) -> bool:
    return value not in (None, "", [], {}) and not (value is False and name in OFF)

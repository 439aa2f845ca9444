"""Completions of a given form: which tokens may come next, by llguidance (an optional dependency, imported late)."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Between the parts of JSON: nothing, one space, or a new line with its indentation. Without a bound a model may write
# spaces until its tokens run out.
WHITESPACE = r"([ ]|\n[ \t]{0,40})?"
_RULES: dict[str, tuple[tuple[type, ...], str]] = {
    "json_object": ((bool,), "True or False"),
    "json_schema": ((Mapping, str), "a JSON schema, as a mapping or as text"),
    "regex": ((str,), "a regular expression"),
    "grammar": ((str,), "the text of a grammar"),
}
_NO_END = "<|foveal: no end|>"
# Grammars kept compiled: clients send the same few schemas again and again.
_KEPT = 64


@dataclass(frozen=True)
class Guidance:
    """The form of a completion: exactly one of the fields.

    Raises ValueError where that is not so. Whether a schema, an expression or a grammar can be followed is found out
    when a request brings it (`Engine.check`).
    """

    json_object: bool = False
    """Any JSON object."""
    json_schema: Mapping[str, Any] | str | None = None
    """JSON that is valid under this schema (a mapping, or its text)."""
    regex: str | None = None
    """Text that this regular expression matches from its beginning to its end (Rust's syntax: no look-around)."""
    grammar: str | None = None
    """Text of this grammar, in llguidance's dialect of Lark."""

    def __post_init__(self) -> None:
        given = [name for name in _RULES if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(f"guidance takes exactly one of {', '.join(_RULES)}, not {' and '.join(given) or 'none'}")
        value = getattr(self, given[0])
        kinds, rule = _RULES[given[0]]
        if not isinstance(value, kinds):
            raise ValueError(f"{given[0]} must be {rule}, not {value!r}")
        if self.json_schema is not None:
            _check_json(self.json_schema)

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(name for name in _RULES if getattr(self, name) not in (None, False))


def _check_json(schema: Mapping[str, Any] | str) -> None:
    try:
        text = schema if isinstance(schema, str) else json.dumps(dict(schema), allow_nan=False)
        read = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema is no JSON: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"json_schema must be an object, not {schema!r}")


class Guide:
    """How far one completion has come in its grammar.

    Its state is that of the tokens that it has been shown, so it can be brought up to date, or built anew, from a
    sequence's tokens alone.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int, forbidden: Sequence[int] = ()) -> None:
        """`vocab_size`: of the model; `forbidden`: tokens never allowed, whatever the grammar says."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._forbidden = list(forbidden)
        self._shown = 0

    def follow(self, tokens: Sequence[int]) -> None:
        """Take in those of a completion's tokens that are new since the last time.

        Where they break the grammar's rules, or following them takes too much work, `allowed` will say so.
        """
        new = list(tokens[self._shown :])
        self._shown += len(new)
        self._matcher.consume_tokens(new)

    @property
    def complete(self) -> bool:
        """Whether the text is whole and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> Tensor:
        """bool [V]: the tokens that may come next. Raises ValueError where there is none."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed_V = np.zeros(self._vocab_size, dtype=np.bool_)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        allowed_V[: len(known)] = known
        allowed_V[self._forbidden] = False
        if self._matcher.is_error() or not allowed_V.any():
            reason = self._matcher.get_error().partition("\n")[0]
            raise ValueError(f"guidance: {reason or 'no token of the model can continue the text'}")
        return torch.from_numpy(allowed_V)


class Grammars:
    """Compiles guidance for one model's tokens."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """`tokenizer` is transformers'; nothing is imported or built before the first `guide`, which takes up to a
        second for a large vocabulary."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(token for token in eos_ids if token < vocab_size)
        self._words: LLTokenizer | None = None
        self._never: list[int] = []
        """An end for llguidance where the model has none; no completion may have it."""
        self._compiled = lru_cache(maxsize=_KEPT)(self._compile)

    def guide(self, guidance: Guidance, *, ignore_eos: bool = False) -> Guide:
        """A guide at the beginning of a completion. The end-of-sequence token is allowed where the text may end, or not
        at all with `ignore_eos`.

        Raises ValueError, naming the field, where the schema, expression or grammar cannot be followed, and where
        llguidance is not installed or the tokenizer is not one that it can read.
        """
        value = getattr(guidance, guidance.kind)
        text = json.dumps(dict(value)) if isinstance(value, Mapping) else str(value)
        matcher = self._compiled(guidance.kind, text).deep_copy()
        forbidden = [*self._never, *(self._eos_ids if ignore_eos else ())]
        return Guide(matcher, self._vocab_size, forbidden)

    def _compile(self, kind: str, text: str) -> "LLMatcher":
        if self._words is None:
            self._words = self._read_tokenizer()
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._words, _grammar(kind, text), log_level=0)
        except ValueError as error:
            raise ValueError(f"{kind}: {error}") from None
        if matcher.is_error():
            raise ValueError(f"{kind}: {' '.join(matcher.get_error().split())}")
        return matcher

    def _read_tokenizer(self) -> "LLTokenizer":
        from_tokenizer = _package().hf.from_tokenizer
        tokenizer, ends = self._tokenizer, self._eos_ids
        try:
            if not ends:  # it must be among the tokenizer's tokens
                tokenizer = deepcopy(tokenizer)
                tokenizer.add_special_tokens({"eos_token": _NO_END})
                ends = [tokenizer.convert_tokens_to_ids(_NO_END)]
                self._never = [token for token in ends if token < self._vocab_size]
            size = max(self._vocab_size, len(tokenizer))
            words: LLTokenizer = from_tokenizer(tokenizer, n_vocab=size, eos_token=ends)
        except ValueError as error:
            raise ValueError(f"guidance cannot read this model's tokenizer: {error}") from None
        return words


def check_schema(schema: Mapping[str, Any], name: str) -> None:
    """Raises ValueError, beginning with `name`, where JSON cannot be held to this schema."""
    llguidance = _package()
    grammar = _grammar("json_schema", json.dumps(dict(schema)))
    problem = llguidance.LLMatcher.validate_grammar(grammar)
    if problem and not problem.startswith("WARNING"):
        raise ValueError(f"{name}: {' '.join(problem.split())}")


def _package() -> Any:
    try:
        import llguidance.hf
    except ImportError:
        raise ValueError("guidance needs the package llguidance: pip install 'foveal[serve]'") from None
    return llguidance


def _grammar(kind: str, text: str) -> str:
    """The form that llguidance compiles. Raises ValueError for text that is no schema."""
    from llguidance import LLMatcher

    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "grammar":
        return LLMatcher.grammar_from_lark(text)
    schema = '{"type": "object"}' if kind == "json_object" else text
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})

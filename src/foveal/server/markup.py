"""Special markers: in text that comes in pieces, and in grammars."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from foveal.engine.detokenize import overlap
from foveal.engine.guidance import WHITESPACE, Guidance

Markers = Mapping[str, int]
"""Tokens that a tokenizer knows besides the words it has learned, by their text: `added_markers`."""


def added_markers(tokenizer: Any) -> dict[str, int]:
    """The added tokens of transformers' tokenizer: a marker among them is one token, which no letters can spell."""
    added: dict[str, int] = tokenizer.get_added_vocab()
    return added


def find_first(text: str, markers: Iterable[str], start: int = 0) -> tuple[int, str] | None:
    """Where the first of the markers stands, and which it is (of several at one place the longest)."""
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker, start)) >= 0]
    return (min(found)[0], min(found)[2]) if found else None


def held_back(text: str, markers: Iterable[str]) -> int:
    """How many characters at the text's end may be the beginning of a marker."""
    return max((overlap(text, marker) for marker in markers), default=0)


@dataclass
class LarkRules:
    """A grammar in llguidance's dialect of Lark, rule by rule; a fragment is what may stand on a rule's right side."""

    markers: Markers

    def __post_init__(self) -> None:
        self._rules: list[str] = []

    def rule(self, fragment: str, attributes: str = "") -> str:
        """A new rule; the fragment that stands for it."""
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {fragment}")
        return name

    def text(self, text: str) -> str:
        """Exactly this text. A marker in it may be its token or its letters."""
        inside = sorted((marker for marker in self.markers if marker and marker in text), key=len, reverse=True)
        pieces = re.split("(" + "|".join(map(re.escape, inside)) + ")", text) if inside else [text]
        return " ".join(self._piece(piece) for piece in pieces if piece) or '""'

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON that is valid under the schema."""
        # The schema's own wishes (x-guidance) stand last and win.
        wishes = {"whitespace_pattern": WHITESPACE, **schema.get("x-guidance", {})}
        return self.rule("%json " + json.dumps({**schema, "x-guidance": wishes}))

    def until(self, marker: str) -> str:
        """Any text, and then the marker for the first time."""
        ways = [self.rule(r"/(?s:.*)/", f"[suffix={json.dumps(marker)}]")]
        if marker in self.markers:
            # A token that is none of the text's letters ends the text by itself.
            ways.append(f"{self.without(marker)} <[{self.markers[marker]}]>")
        return self.rule(" | ".join(ways))

    def without(self, marker: str) -> str:
        """Any text in which the marker does not occur."""
        name = f"TEXT_{len(self._rules)}"
        escaped = re.escape(marker).replace("/", r"\/")
        self._rules.append(rf"{name}: /(?s:.*)/ & ~/(?s:.*){escaped}(?s:.*)/")
        return self.rule(name)

    def guidance(self, start: str) -> Guidance:
        """The grammar that begins with this fragment."""
        return Guidance(grammar="\n".join([f"start: {start}", *self._rules]))

    def _piece(self, piece: str) -> str:
        literal = json.dumps(piece, ensure_ascii=False)
        return f"(<[{self.markers[piece]}]> | {literal})" if piece in self.markers else literal

"""From tokens to text while the tokens are still coming."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_HALF = "\N{REPLACEMENT CHARACTER}"
# Text before the window decides how its first token is written (a leading space or none); a few tokens are enough.
_CONTEXT_TOKENS = 5
# A tokenizer may cut characters so that no token ends one for a while; output that is no UTF-8 at all would do so
# forever.
_LONGEST_WINDOW = 32


class Detokenizer:
    """The text of one completion, and where a stop string ends it.

    Decoding one token alone gives the wrong text (spaces, characters of several tokens), and decoding all of them
    again with each new one takes quadratic time. So a window of tokens is decoded: from the last but one token
    boundary at which the text was whole. What a window's text has more than was shown of it is new.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """`decode` leaves special tokens out; `prompt` are the tokens before the completion."""
        self._decode = decode
        self._stop = tuple(stop)
        self._window = list(prompt[-_CONTEXT_TOKENS:])
        self._whole = len(self._window)
        """Tokens of the window after which the text was whole."""
        self._shown = len(decode(self._window).rstrip(_HALF))
        """Characters of the window's text that are no longer new."""
        self._text = ""
        self._searchable = 0
        """Where in the text a stop string may begin."""

    @property
    def text(self) -> str:
        """The whole text, without half characters."""
        return self._text

    @property
    def safe_text(self) -> str:
        """The text without an end that may turn out to begin a stop string."""
        longest = max((overlap(self._text, stop) for stop in self._stop), default=0)
        return self._text[: len(self._text) - longest]

    def append(self, token: int, *, may_stop: bool = True) -> str | None:
        """Take one more token; the stop string that this completed, if any. The text is then cut before it.

        may_stop=False: text up to this token is no part of a stop string (`min_tokens`).
        """
        self._window.append(token)
        before = len(self._text)
        self._text += self._new_text()
        if not may_stop:
            self._searchable = len(self._text)
        return self._find_stop(before)

    def finish(self) -> None:
        """No token follows: let out what was held back as half a character."""
        self._text += self._decode(self._window)[self._shown :]

    def _new_text(self) -> str:
        text = self._decode(self._window)
        whole = text.rstrip(_HALF)
        if len(self._window) - self._whole >= _LONGEST_WINDOW:
            whole = text
        new = whole[self._shown :]
        if len(whole) < len(text):
            self._shown = max(self._shown, len(whole))
        else:
            self._window = self._window[self._whole :]
            self._whole = len(self._window)
            self._shown = len(self._decode(self._window))
        return new

    def _find_stop(self, before: int) -> str | None:
        found: list[tuple[int, str]] = []
        for stop in self._stop:
            at = self._text.find(stop, max(self._searchable, before - len(stop) + 1))
            if at >= 0:
                found.append((at, stop))
        if not found:
            return None
        at, stop = min(found, key=lambda match: match[0])
        self._text = self._text[:at]
        return stop


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)

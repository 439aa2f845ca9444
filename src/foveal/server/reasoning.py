"""Reasoning that a model writes before its answer, between <think> and </think>."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from foveal.engine.guidance import Guidance
from foveal.server.markup import LarkRules, Markers, held_back

OPEN, CLOSE = "<think>", "</think>"


def reasons(template: str | None) -> bool:
    """Whether models with this chat template may write their reasoning first."""
    return template is not None and CLOSE in template


def opens_reasoning(prompt: str) -> bool:
    """Whether the prompt ends inside reasoning: some templates write the opening mark themselves."""
    return prompt.rstrip().endswith(OPEN)


@dataclass(frozen=True)
class Split:
    """What one piece of text adds to the reasoning and to the answer."""

    reasoning: str = ""
    content: str = ""


class ReasoningSplitter:
    """Parts a completion's text, which may come in pieces of any size, into reasoning and answer.

    Reasoning is what stands before the first </think>, if the prompt has opened it (`inside`) or the text begins with
    <think>. White space around reasoning and before the answer is dropped; a text without reasoning stays as it is.
    However the text is cut, the pieces add up to the same.
    """

    def __init__(self, *, inside: bool) -> None:
        self._inside = inside
        self._begun = inside
        """Whether it is known if there is reasoning."""
        self._bare = inside
        """Whether leading white space is still to be dropped."""
        self._held = ""

    def feed(self, text: str) -> Split:
        """Take the next piece."""
        self._held += text
        if not self._begun:
            self._begin()
        if not self._begun:
            return Split()
        reasoning = self._reasoning() if self._inside else ""
        return Split(reasoning, "" if self._inside else self._content())

    def finish(self) -> Split:
        """No text follows: what was held back."""
        held, self._held = self._held, ""
        self._begun = True
        return Split(reasoning=held.rstrip()) if self._inside else Split(content=held)

    def _begin(self) -> None:
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self._held = start[len(OPEN) :]
            self._begun = self._inside = self._bare = True
        elif not OPEN.startswith(start):
            self._begun = True

    def _reasoning(self) -> str:
        self._strip()
        before, mark, after = self._held.partition(CLOSE)
        if mark:
            self._inside, self._bare, self._held = False, True, after
            return before.rstrip()
        # White space before what may be the end belongs to the end.
        shown = before[: len(before) - held_back(before, [CLOSE])].rstrip()
        self._held = before[len(shown) :]
        return shown

    def _content(self) -> str:
        self._strip()
        content, self._held = self._held, ""
        return content

    def _strip(self) -> None:
        if self._bare:
            self._held = self._held.lstrip()
            self._bare = not self._held


def after_reasoning(guidance: Guidance, markers: Markers) -> Guidance:
    """The form for a completion that begins inside reasoning: any text, </think>, then what was asked for.

    Raises ValueError for a grammar, whose rules cannot be put into another's.
    """
    rules = LarkRules(markers)
    if guidance.grammar is not None:
        raise ValueError("a grammar cannot be combined with reasoning; switch the model's reasoning off")
    if guidance.regex is not None:
        from llguidance import regex_to_lark

        form = rules.rule("/" + regex_to_lark(guidance.regex, "") + "/")
    elif guidance.json_object:
        form = rules.json({"type": "object"})
    else:
        schema = guidance.json_schema
        form = rules.json(schema if isinstance(schema, Mapping) else json.loads(schema or "{}"))
    return rules.guidance(f"{rules.until(CLOSE)} {rules.rule(BLANK)} {form}")


BLANK = r"/[ \n]{0,3}/"
"""Lark: the few line breaks that models write after </think>."""

"""A whole training update on the Triton kernels, interpreted: what a card runs, short of the card."""

from itertools import product

import pytest
from updates import WITHOUT_EXPERTS, differ, update

from foveal.kernels import index_divergence, select, sparse_attention

# Three quarters of a minute in the interpreter.
_SLOW = ("grouped heads", "sparse")


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case == _SLOW else [])
        for case in product(WITHOUT_EXPERTS, ("warmup", "sparse"))
    ],
)
def test_an_update(model: str, kind: str, request: pytest.FixtureRequest) -> None:
    """Arguments that a model gives and tests of one kernel do not: packed documents, rows of weight 0, shared rows."""
    expected, exact = update(model, kind, "cpu")
    request.getfixturevalue("interpreted")
    assert {operation.chosen("cpu") for operation in (index_divergence, select, sparse_attention)} == {"triton"}
    values, gradients = update(model, kind, "cpu")
    assert values == pytest.approx(expected, rel=1e-4)
    assert differ(gradients, exact) < 1e-3

"""Validation of `SamplingParams`."""

from typing import Any

import pytest

from foveal.engine.params import SamplingParams

BAD: list[tuple[str, Any]] = [
    *[("n", value) for value in (0, 1.0, True, "2")],
    *[("temperature", value) for value in (-0.1, float("nan"), float("inf"), None, "1")],
    *[("top_p", value) for value in (0.0, 1.1, -1)],
    *[("top_k", value) for value in (-2, 1.5)],
    *[("min_p", value) for value in (-0.1, 1.1)],
    *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1)],
    *[("repetition_penalty", value) for value in (0.0, -1.0, 1e-300, 1e300)],
    *[("logit_bias", value) for value in ([1], {"1": 1.0}, {1: 101}, {-1: 0.5}, {1: float("nan")})],
    *[("stop", value) for value in ("", ["a", ""], [1], 3)],
    *[("stop_token_ids", value) for value in ([1.0], [-1], 5)],
    ("ignore_eos", 1),
    *[("max_tokens", value) for value in (0, -1, 1.0)],
    *[("min_tokens", value) for value in (-1, 17)],
    *[("seed", value) for value in (1.0, True)],
    *[(name, value) for name in ("logprobs", "prompt_logprobs") for value in (-1, True)],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    """Guards against a parameter that is accepted although it means nothing."""
    with pytest.raises(ValueError, match=f"^{name} must be") as raised:
        SamplingParams(**{name: value})
    assert repr(value) in str(raised.value)


def test_an_unknown_name_is_refused() -> None:
    """Guards against parameters that are silently ignored."""
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_the_edges_are_allowed() -> None:
    """Guards against refusing values at the ends of their ranges."""
    params = SamplingParams(
        temperature=0,
        top_p=1,
        top_k=-1,
        repetition_penalty=100,
        min_p=1.0,
        presence_penalty=-2,
        logit_bias={0: -100},
        stop="x",
        max_tokens=None,
        min_tokens=99,
        logprobs=0,
    )
    assert params.greedy and params.stop_strings == ("x",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b") and SamplingParams().stop_strings == ()

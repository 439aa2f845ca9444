"""A decoder under another selection than its own, and itself again afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import make_oracle

from foveal import load_model
from foveal.engine import LLM, SamplingParams
from foveal.evaluate.perplexity import window_losses
from foveal.evaluate.selecting import KINDS, Selection, selecting
from foveal.evaluate.text import Window
from foveal.models import Decoder


def losses(model: Decoder, windows: list[Window], selection: Selection | None = None) -> torch.Tensor:
    if selection is None:
        return torch.cat(window_losses(model, windows))
    with selecting(model, selection):
        return torch.cat(window_losses(model, windows))


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_every_selection_is_another_and_the_model_is_itself_again(
    family: str, tmp_path: Path, windows: list[Window]
) -> None:
    """Guards against a selection that is accepted and changes nothing, and against traces that it leaves."""
    make_oracle(family, tmp_path)
    model = load_model(tmp_path)
    own = losses(model, windows)
    kinds = [Selection(kind) for kind in KINDS] + [Selection("indexer", 30), Selection("recency", 30)]
    results = [losses(model, windows, kind) for kind in kinds]
    torch.testing.assert_close(results[0], own)
    for place, one in enumerate(results):
        assert all(not torch.equal(one, other) for other in results[:place]), kinds[place]
    torch.testing.assert_close(losses(model, windows), own)


@pytest.mark.parametrize("family", ["llama", "deepseek_v32"])
def test_a_selection_of_everything_is_dense(family: str, tmp_path: Path, windows: list[Window]) -> None:
    make_oracle(family, tmp_path)
    model = load_model(tmp_path)
    dense = losses(model, windows, Selection("dense"))
    for kind in ("recency", "random", "oracle"):
        torch.testing.assert_close(losses(model, windows, Selection(kind, 200)), dense)
        # All but one token: nearly dense, and surely not what is left of everything by mistake.
        near = losses(model, windows, Selection(kind, 140))
        assert (near - dense).abs().max() > 0 and (near - dense).abs().mean() < 0.02


def test_dense_is_what_a_top_k_beyond_the_context_gives(tmp_path: Path, windows: list[Window]) -> None:
    make_oracle("deepseek_v32", tmp_path)
    model = load_model(tmp_path)
    torch.testing.assert_close(
        losses(model, windows, Selection("dense")), losses(model, windows, Selection("indexer", 256))
    )


def test_the_oracle_is_nearest_to_dense(tmp_path: Path, windows: list[Window]) -> None:
    """Of an untrained model too: what attention looks at most matters most."""
    make_oracle("llama", tmp_path)
    model = load_model(tmp_path)
    dense = losses(model, windows, Selection("dense"))
    gap = {kind: (losses(model, windows, Selection(kind, 24)) - dense).abs().mean() for kind in ("random", "oracle")}
    assert gap["oracle"] < 0.7 * gap["random"]


def test_fused_steps_follow_the_selection(tmp_path: Path) -> None:
    """Guards against runs of blocks in one compiled call that were made before the selection changed."""
    make_oracle("llama", tmp_path)
    model = load_model(tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompt = {"prompt_token_ids": [5, 6, 7, 8] * 12}

    def written() -> list[Any]:
        llm = LLM(model, skip_tokenizer_init=True, max_num_seqs=1, max_model_len=128)
        return llm.generate(prompt, params)[0].outputs[0].token_ids

    with selecting(model, Selection("recency", 6)):
        plain = written()
    own = written()
    model.pack()
    fused = model.fused
    with selecting(model, Selection("recency", 6)):
        assert written() == plain
    assert model.fused == fused
    assert written() == own != plain


def test_windowed_layers_keep_their_window(tmp_path: Path, windows: list[Window]) -> None:
    """Qwen2's first layer is dense here, the others look at the last tokens anyway."""
    make_oracle("qwen2", tmp_path)
    model = load_model(tmp_path)
    with selecting(model, Selection("recency", 30)):
        assert [block.indexer is not None for layer in model.layers for block in layer.blocks][::2] == [
            True,
            False,
            False,
        ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nearest",), "a selection is one of indexer, dense"),
        (("random", 0), "at least 1 token, not 0"),
        (("dense", 5), "dense attention has no top-k"),
    ],
)
def test_senseless_selections_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(*arguments)


def test_a_dense_model_has_nothing_to_select_with(tmp_path: Path) -> None:
    make_oracle("llama", tmp_path)
    model = load_model(tmp_path)
    with pytest.raises(ValueError, match="no indexer"), selecting(model, Selection("indexer")):
        pass
    with pytest.raises(ValueError, match="'random' needs a top-k"), selecting(model, Selection("random")):
        pass

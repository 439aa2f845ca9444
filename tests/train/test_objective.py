"""Which tokens' selections teach the indexers."""

import torch

from foveal.train.objective import compared


def test_a_share_keeps_the_mean() -> None:
    """A loss that shrinks with the share, or a share that is not kept to."""
    weights_T = compared(torch.arange(100_000), 0.25)
    assert set(weights_T.tolist()) == {0.0, 4.0}
    assert abs(weights_T.mean() - 1) < 0.02
    assert compared(torch.arange(50), 1.0).tolist() == [1.0] * 50


def test_a_row_repeats_its_draw_and_others_do_not() -> None:
    """A resumed run that goes another way; one choice of places for all rows."""
    ids_T = torch.arange(1000)
    assert torch.equal(compared(ids_T, 0.5), compared(ids_T, 0.5))
    assert not torch.equal(compared(ids_T, 0.5), compared(ids_T + 1, 0.5))

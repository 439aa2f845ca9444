"""The Triton kernel of the experts, interpreted, beside the reference."""

import pytest
import torch
from torch.nn.functional import silu

from foveal.kernels import experts
from foveal.kernels.gpu.pairs import pair_products


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("sizes", [(1, 40, 24), (7, 300, 9)], ids=str)
def test_experts(sizes: tuple[int, int, int]) -> None:
    """A token that gets another's expert or weight; widths that fill no block, and more than one."""
    tokens, hidden, inner = sizes
    torch.manual_seed(0)
    x, weights, chosen = torch.randn(tokens, hidden), torch.rand(tokens, 3), torch.rand(tokens, 6).topk(3).indices
    gate_up, down = torch.randn(6, 2 * inner, hidden), torch.randn(6, hidden, inner)
    arguments = (x, weights, chosen, gate_up, down, silu)
    result = experts(*arguments, version="triton")
    torch.testing.assert_close(result, experts(*arguments, version="reference"), rtol=1e-4, atol=1e-3)


def test_sizes_that_do_not_fit() -> None:
    """Reading past the end of x."""
    chosen = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="does not fit"):
        pair_products(torch.zeros(2, 8), torch.zeros(4, 5, 9), chosen, chosen.flatten())

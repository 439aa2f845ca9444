"""S4D."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu

from foveal.config.model import S4DConfig
from foveal.kernels import Queries, s4d
from foveal.nn.linear import Linear
from foveal.nn.recurrent import Recurrent


class S4D(Recurrent):
    """Diagonal state space (arXiv 2206.11893): one that does not look at its input, in every channel; then GELU and a
    gated linear layer. Parameters are float32 but for the linear layer's."""

    config: S4DConfig

    def __init__(self, config: S4DConfig, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        if config.channels != hidden_size:
            raise ValueError(f"S4D needs as many channels as the hidden size of {hidden_size}, not {config.channels}")
        self.config = config
        channels, state = config.channels, config.state
        self.log_dt, self.D = (nn.Parameter(torch.empty(channels, dtype=torch.float32)) for _ in range(2))
        self.A_log, self.A_imag = (nn.Parameter(torch.empty(channels, state, dtype=torch.float32)) for _ in range(2))
        self.C = nn.Parameter(torch.empty(channels, state, 2, dtype=torch.float32))
        self.out_proj = Linear(channels, 2 * hidden_size, bias=True, dtype=dtype)

    def recur(
        self, x_TD: Tensor, inputs_SWX: Tensor, state_S: Tensor, queries: Queries
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Recurrent.recur`; there is no convolution before it, and so no inputs."""
        u_TX = x_TD.float()
        a_XY2 = torch.stack((-self.A_log.exp(), self.A_imag), -1)
        y_TX, state_S = s4d(u_TX, self.log_dt.exp(), a_XY2, self.C, state_S, queries)
        y_TX = gelu(y_TX + self.D * u_TX)
        return glu(self.out_proj(y_TX.to(x_TD.dtype)), -1), inputs_SWX, state_S

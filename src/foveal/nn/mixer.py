"""What every mixer is: something that lets tokens see earlier ones."""

from torch import Tensor, nn

from foveal.cache.layouts import BlockCache
from foveal.nn.step import Step


class Mixer(nn.Module):
    """Base of the mixers. `forward` takes what `query_latent` returned, so that an indexer can use it as well."""

    def query_latent(self, x_TD: Tensor) -> Tensor:
        """What queries are projected from: the hidden state itself unless the mixer compresses it."""
        return x_TD

    def forward(self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None) -> Tensor:
        """[T, D] -> [T, D]; attends to `step.selection_TK` where that is set."""
        raise NotImplementedError

"""Training in several processes: what the trainer asks `Parallel`, which one process answers trivially."""

from foveal.train.parallel.alone import Parallel
from foveal.train.parallel.join import check_context, join

__all__ = ["Parallel", "check_context", "join"]

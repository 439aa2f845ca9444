"""Counting the multiply-accumulates of a real forward: torch's counter for its own operations, ours for ours."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from foveal.costs import causal_pairs, selected_pairs
from foveal.kernels import KeySource, Queries
from foveal.kernels.dispatch import Operation

aten = torch.ops.aten


def _mv(matrix: Any, vector: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _grouped_mm(x: Any, weights: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """[T, D] with [E, D, F]: each row meets the matrix of its group."""
    return 2 * x[0] * weights[1] * weights[2]


def _cpu_attention(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """[S, H, Q, P], [S, H, N, P], [S, H, N, V]: a mask saves nothing."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


# What torch's counter takes for nothing.
UNCOUNTED: dict[Any, Any] = {
    aten.mv: _mv,
    aten._grouped_mm: _grouped_mm,
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
}


@dataclass
class Counted:
    """MACs of one forward."""

    counter: FlopCounterMode
    ours: Counter[str] = field(default_factory=Counter)
    """By our own operations, from the formulas below."""

    @property
    def total(self) -> int:
        """Everything."""
        return self.counter.get_total_flops() // 2 + sum(self.ours.values())

    def module(self, name: str) -> int:
        """What torch counted inside a module, by its path."""
        return sum(self.counter.get_flop_counts().get(name, {}).values()) // 2


@contextmanager
def counted(version: str) -> Iterator[Counted]:
    """Count with every operation of ours run in `version`, through torch's own operations."""

    def forced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(self, version, args, kwargs)

    with patch.object(Operation, "__call__", forced), _counter() as counter:
        yield Counted(counter)


@contextmanager
def counted_by_formula(results: Callable[..., Any] | None = None) -> Iterator[Counted]:
    """Count our own operations by formula, whatever they run inside; the others (products with weights, norms) and all
    that is torch's by torch's counter.

    `results(name, *args, **kwargs)` stands in for what an operation with a formula returns (on the meta device, where
    there are no numbers to route by); None: it runs in its preferred version.
    """
    call = Operation.__call__
    with _counter() as counter:
        found = Counted(counter)

        def formula(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.name not in FORMULAS:
                return _run(self, "torch", args, kwargs)
            found.ours[self.name] += FORMULAS[self.name](*args, **kwargs)
            with _disable_current_modes():
                return results(self.name, *args, **kwargs) if results else call(self, *args, **kwargs)

        with patch.object(Operation, "__call__", formula):
            yield found


def _run(operation: Any, preferred: str, args: Any, kwargs: Any) -> Any:
    """Run the version that the call forces, or the preferred one, or the reference where there is none of that name; on
    any device."""
    versions, options = operation._versions, dict(kwargs)
    version = versions.get(options.pop("version", preferred), versions["reference"])
    return version.run(*args, **options)


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=UNCOUNTED)


def _attention(
    q_THP: Tensor,
    keys: KeySource,
    values: KeySource,
    queries: Queries,
    *,
    window: int | None = None,
    **_: Any,
) -> int:
    """Visible pairs x H (P + V); a selection is a mask here, and saves nothing."""
    _, heads, width = q_THP.shape
    value_width = values.context(0, 0, 1).shape[-1]
    pairs = 0
    for _, count, first in queries:
        context = first + count
        pairs += causal_pairs(count, context) if window is None else selected_pairs(count, context, window)
    return pairs * heads * (width + value_width)


def _sparse_attention(
    q_THP: Tensor, keys: KeySource, values: KeySource, selection_TK: Tensor, queries: Queries, **_: Any
) -> int:
    """What was really selected x H (P + V)."""
    value_width = values.context(0, 0, 1).shape[-1]
    return int((selection_TK >= 0).sum()) * q_THP.shape[1] * (q_THP.shape[2] + value_width)


def _select(q_TIJ: Tensor, weights_TI: Tensor, keys: KeySource, queries: Queries, *, topk: int) -> int:
    """Visible pairs x I J."""
    pairs = sum(causal_pairs(count, first + count) for _, count, first in queries)
    return pairs * q_TIJ.shape[1] * q_TIJ.shape[2]


def _experts(x_TD: Tensor, weights_TA: Tensor, chosen_TA: Tensor, gate_up: Any, down: Any, activation: Any) -> int:
    """Each token with each expert that it chose."""
    return chosen_TA.numel() * (gate_up[0].numel() + down[0].numel())


def _selective_scan(u_TX: Tensor, dt_TX: Tensor, a_XY: Tensor, *_: Any) -> int:
    return 3 * len(u_TX) * a_XY.numel()


def _ssd(x_THP: Tensor, dt_TH: Tensor, a_H: Tensor, b_TGY: Tensor, *_: Any) -> int:
    return 3 * x_THP.numel() * b_TGY.shape[-1]


def _linear_attention(q_TGP: Tensor, k_TGP: Tensor, v_THV: Tensor, *_: Any) -> int:
    return 3 * v_THV.numel() * k_TGP.shape[-1]


def _delta_rule(q_TGP: Tensor, k_TGP: Tensor, v_THV: Tensor, *_: Any) -> int:
    return 4 * v_THV.numel() * k_TGP.shape[-1]


def _causal_conv(x_TX: Tensor, weight_XW: Tensor, *_: Any) -> int:
    return len(x_TX) * weight_XW.numel()


FORMULAS: dict[str, Callable[..., int]] = {
    "attention": _attention,
    "sparse_attention": _sparse_attention,
    "select": _select,
    "experts": _experts,
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "linear_attention": _linear_attention,
    "delta_rule": _delta_rule,
    "causal_conv": _causal_conv,
}

"""Matrix absorption: merging two weights in a row into one, and when that costs less."""

from dataclasses import dataclass

from foveal.config.model import MLAConfig
from foveal.costs.attention import mla_macs


@dataclass(frozen=True)
class Absorption:
    """Y = X A B with X [rows, inner], A [inner, rank], B [rank, outer]: in two steps, or with A B merged beforehand."""

    rows: int
    inner: int
    rank: int
    outer: int
    copies: int = 1
    """Pairs of matrices like that: the heads."""

    @property
    def separate_flops(self) -> int:
        """2 m d_c (d + n) floating-point operations: X A, then times B."""
        return 2 * self.rows * self.separate_numbers

    @property
    def merged_flops(self) -> int:
        """2 m d n: X times the merged matrix."""
        return 2 * self.rows * self.merged_numbers

    @property
    def separate_numbers(self) -> int:
        """d_c (d + n) weights to keep and to read."""
        return self.copies * self.rank * (self.inner + self.outer)

    @property
    def merged_numbers(self) -> int:
        """d n weights."""
        return self.copies * self.inner * self.outer

    @property
    def merging_pays(self) -> bool:
        """Merged is cheaper where d n < d_c (d + n), whatever the rows: where the rank is above d n / (d + n), half the
        width if d = n."""
        return self.merged_numbers < self.separate_numbers


def mla_absorptions(mla: MLAConfig, hidden: int) -> dict[str, Absorption]:
    """The weight pairs of one MLA layer that could be merged into one, for one token and all heads.

    "keys": per head, the query's up-projection C_q -> P, then W_UK^T P -> C. "output": per head, W_UV C -> V, then the
    head's part of the output projection V -> D. The absorbed form does not merge them: it changes the order of the
    products, and keeps the bottlenecks P and V (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
    """
    query = mla.q_lora_rank or hidden
    return {
        "keys": Absorption(1, query, mla.nope_dim, mla.kv_lora_rank, copies=mla.heads),
        "output": Absorption(1, mla.kv_lora_rank, mla.value_dim, hidden, copies=mla.heads),
    }


def expansion_macs(mla: MLAConfig, context: int) -> int:
    """MACs of one layer to expand the latents of a whole context into keys and values: n C H (P + V). Done anew at each
    decoded token unless it is absorbed."""
    return context * mla.kv_lora_rank * mla.heads * (mla.nope_dim + mla.value_dim)


def absorbed_pays(mla: MLAConfig, queries: int, context: int) -> bool:
    """Whether the absorbed form has fewer MACs than the expanded one (`mla_macs`)."""
    macs = mla_macs(mla, queries, context)
    return macs["absorbed"] < macs["expanded"]


def most_absorbed_queries(mla: MLAConfig, context: int) -> int:
    """The most new tokens at the end of `context` for which the absorbed form is cheaper; 0: for none.

    The absorbed form's advantage falls with every further query (it pays H (2 C - P - V) more a pair, and expansion is
    spared only once), so it is found by bisection.
    """
    low, high = 0, context + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if absorbed_pays(mla, middle, context) else (low, middle)
    return low

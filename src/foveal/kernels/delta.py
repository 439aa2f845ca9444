"""Linear attention: a state of keys by values a head, that decays and is written to, by addition or by the delta rule.

In all of them a sequence's state S [P, V] of a head meets, token by token, a query q [P], a key k [P], a value v [V]
and the logarithm g <= 0 of a decay, [P] or [1] (one for the whole head; zero: no decay). Keys and queries may have
fewer heads than values: each then serves H / G value heads that follow one another.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.kernels.dispatch import operation
from foveal.kernels.keys import Queries
from foveal.kernels.rounds import in_rounds

# Tokens of a chunk. With a decay for each key dimension the pairs of a chunk are counted out in all of them.
CHUNK, CHUNK_BY_DIMENSION = 64, 16


@operation(differentiable=True)
def linear_attention(
    q_TGP: Tensor, k_TGP: Tensor, v_THV: Tensor, decay_THP: Tensor, state_SHPV: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    """S = exp(g) S + k v^T; o = S^T q: gated linear attention (arXiv 2312.06635, equation 3), and plain (g = 0).

    q, k: [T, G, P], feature map and scale applied; v: [T, H, V]; decay: [T, H, P] or [T, H, 1], logarithms; state:
    [S, H, P, V], where each sequence starts. Returns o [T, H, V] and the states after each sequence's last token.
    """
    ones_TH = torch.ones_like(v_THV[..., 0])
    return _token_by_token(q_TGP, k_TGP, v_THV, decay_THP, ones_TH, state_SHPV, queries, delta=False)


@operation(differentiable=True)
def delta_rule(
    q_TGP: Tensor,
    k_TGP: Tensor,
    v_THV: Tensor,
    decay_THP: Tensor,
    beta_TH: Tensor,
    state_SHPV: Tensor,
    queries: Queries,
) -> tuple[Tensor, Tensor]:
    """S = (I - b k k^T) exp(g) S + b k v^T; o = S^T q. With one decay a head it is the gated delta rule (arXiv
    2412.06464, equation 10), with one a key dimension Kimi Delta Attention (arXiv 2510.26692, equation 1).

    q, k: [T, G, P], k of length 1 at most, scale applied; v: [T, H, V]; decay: [T, H, P] or [T, H, 1], logarithms;
    beta: [T, H]; state: [S, H, P, V], where each sequence starts. Returns o [T, H, V] and the states after each
    sequence's last token.
    """
    return _token_by_token(q_TGP, k_TGP, v_THV, decay_THP, beta_TH, state_SHPV, queries, delta=True)


def _token_by_token(
    q_TGP: Tensor,
    k_TGP: Tensor,
    v_THV: Tensor,
    decay_THP: Tensor,
    beta_TH: Tensor,
    state_SHPV: Tensor,
    queries: Queries,
    *,
    delta: bool,
) -> tuple[Tensor, Tensor]:
    repeats = v_THV.shape[1] // k_TGP.shape[1]
    outputs, states = [], []
    for s, (row, count, _) in enumerate(queries):
        state_HPV = state_SHPV[s]
        for t in range(row, row + count):
            q_HP, k_HP = q_TGP[t].repeat_interleave(repeats, 0), k_TGP[t].repeat_interleave(repeats, 0)
            state_HPV = decay_THP[t].exp()[..., None] * state_HPV
            old_HV = torch.einsum("hp,hpv->hv", k_HP, state_HPV) if delta else 0
            new_HV = beta_TH[t][:, None] * (v_THV[t] - old_HV)
            state_HPV = state_HPV + torch.einsum("hp,hv->hpv", k_HP, new_HV)
            outputs.append(torch.einsum("hp,hpv->hv", q_HP, state_HPV))
        states.append(state_HPV)
    return torch.stack(outputs), torch.stack(states)


@linear_attention.add("torch", differentiable=True)
def linear_attention_in_chunks(
    q_TGP: Tensor, k_TGP: Tensor, v_THV: Tensor, decay_THP: Tensor, state_SHPV: Tensor, queries: Queries
) -> tuple[Tensor, Tensor]:
    """See `linear_attention`."""
    size = CHUNK if decay_THP.shape[-1] == 1 else CHUNK_BY_DIMENSION
    return in_rounds(_chunk, (q_TGP, k_TGP, v_THV, decay_THP), state_SHPV, queries, size)


@delta_rule.add("torch", differentiable=True)
def _delta_rule_in_chunks(
    q_TGP: Tensor,
    k_TGP: Tensor,
    v_THV: Tensor,
    decay_THP: Tensor,
    beta_TH: Tensor,
    state_SHPV: Tensor,
    queries: Queries,
) -> tuple[Tensor, Tensor]:
    size = CHUNK if decay_THP.shape[-1] == 1 else CHUNK_BY_DIMENSION
    return in_rounds(_chunk, (q_TGP, k_TGP, v_THV, decay_THP, beta_TH), state_SHPV, queries, size)


def _chunk(inputs: Sequence[Tensor], state_SHPV: Tensor) -> tuple[Tensor, Tensor]:
    """N tokens of S sequences at a time: q, k, v and decay [S, N, heads, ...], and beta for the delta rule.

    With c the sum of the decays' logarithms since the chunk's start, S_i = exp(c_i) S_0 + sum_{j <= i} exp(c_i - c_j)
    k_j u_j^T, where u = v, or by the delta rule u_i = b_i (v_i - (what S_i, without its last term, returns for k_i)):
    a triangular system (arXiv 2412.06464, section 3.3; 2510.26692, section 3.2).
    """
    q_SNGP, k_SNGP, v_SNHV, decay_SNHP, *betas = inputs
    repeats = v_SNHV.shape[2] // k_SNGP.shape[2]
    q_SHNP, k_SHNP = (x.repeat_interleave(repeats, 2).transpose(1, 2) for x in (q_SNGP, k_SNGP))
    v_SHNV, decay_SHNP = v_SNHV.transpose(1, 2), decay_SNHP.transpose(1, 2)
    if v_SHNV.shape[2] == 1:
        return _token(q_SHNP, k_SHNP, v_SHNV, decay_SHNP, betas, state_SHPV)
    since_SHNP = decay_SHNP.cumsum(2).exp()
    between_SHNNP = decay_between(decay_SHNP)
    u_SHNV = v_SHNV
    if betas:
        beta_SHN1 = betas[0].transpose(1, 2)[..., None]
        own_SHNN = beta_SHN1 * _scores(k_SHNP, k_SHNP, between_SHNNP)
        u_SHNV = beta_SHN1 * (v_SHNV - (k_SHNP * since_SHNP) @ state_SHPV)
        # Only what lies below the diagonal is read.
        u_SHNV = torch.linalg.solve_triangular(own_SHNN, u_SHNV, upper=False, unitriangular=True)
    o_SHNV = (q_SHNP * since_SHNP) @ state_SHPV + _scores(q_SHNP, k_SHNP, between_SHNNP) @ u_SHNV
    until_end_SHNP = between_SHNNP[:, :, -1]
    state_SHPV = since_SHNP[:, :, -1, :, None] * state_SHPV + (k_SHNP * until_end_SHNP).transpose(-1, -2) @ u_SHNV
    return o_SHNV.transpose(1, 2), state_SHPV


def _token(
    q_SH1P: Tensor, k_SH1P: Tensor, v_SH1V: Tensor, decay_SH1P: Tensor, betas: Sequence[Tensor], state_SHPV: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for one token of each sequence."""
    state_SHPV = decay_SH1P.exp().transpose(-1, -2) * state_SHPV
    u_SH1V = v_SH1V
    if betas:
        u_SH1V = betas[0].transpose(1, 2)[..., None] * (v_SH1V - k_SH1P @ state_SHPV)
    state_SHPV = state_SHPV + k_SH1P.transpose(-1, -2) * u_SH1V
    return (q_SH1P @ state_SHPV).transpose(1, 2), state_SHPV


def decay_between(decay_XNP: Tensor) -> Tensor:
    """exp(sum of the logarithms after token j, up to token i) for i >= j, otherwise 0: [..., N, P] -> [..., N, N, P].

    Each sum is made for itself: differences of sums since the chunk's start would lose small decays behind large ones.
    """
    count = decay_XNP.shape[-2]
    below_NN = torch.ones(count, count, dtype=torch.bool, device=decay_XNP.device).tril(-1)
    # [i, j] holds token i's decay where j < i; summed over i, what lies between j and i.
    each_XNNP = decay_XNP[..., None, :].expand(*decay_XNP.shape[:-1], count, -1).masked_fill(~below_NN[..., None], 0)
    sums_XNNP = each_XNNP.cumsum(-3)
    visible_NN = torch.ones_like(below_NN).tril()
    return sums_XNNP.masked_fill(~visible_NN[..., None], -torch.inf).exp()


def _scores(q_SHNP: Tensor, k_SHNP: Tensor, between_SHNNP: Tensor) -> Tensor:
    """Decayed products of queries with keys at or before them, [S, H, N, N]; 0 elsewhere."""
    if between_SHNNP.shape[-1] == 1:
        return (q_SHNP @ k_SHNP.transpose(-1, -2)) * between_SHNNP[..., 0]
    return torch.einsum("ship,shjp,shijp->shij", q_SHNP, k_SHNP, between_SHNNP)

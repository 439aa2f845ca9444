"""Losses against plain formulas in float64, and what each of them can reach."""

from dataclasses import replace

import pytest
import torch
from tiny import sparse_decoder
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from foveal.config.model import RouterConfig
from foveal.models.decoder import Decoder
from foveal.nn.batch import Batch
from foveal.train import losses
from foveal.train.learner import indexer_parameters

IDS = [torch.arange(40) % 17 + 3, torch.arange(23) * 7 % 19 + 1]


@pytest.fixture
def decoder() -> Decoder:
    return sparse_decoder(torch.float64)


def test_next_token(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile counted twice, or a gradient that misses the head or the tokens' weights."""
    monkeypatch.setitem(losses.TILE_LOGITS, "cpu", 7 * decoder.config.vocab_size)
    x = torch.randn(40, decoder.config.hidden_size, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(decoder.config.vocab_size, (40,)), torch.rand(40, dtype=torch.float64)
    parameters = [x, decoder.norm.weight, decoder.embed_tokens.weight]
    loss = losses.head_loss(decoder, x, weights, losses.next_token(targets))
    plain_logits = decoder.norm(x) @ decoder.embed_tokens.weight.T
    plain = (cross_entropy(plain_logits, targets, reduction="none") * weights).sum()
    torch.testing.assert_close(loss, plain)
    same(torch.autograd.grad(2 * loss, parameters), torch.autograd.grad(2 * plain, parameters))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_taught(decoder: Decoder, temperature: float) -> None:
    """Divergence in the wrong direction, or a temperature that scales the gradient."""
    teacher = sparse_decoder(torch.float64, seed=5).requires_grad_(False)
    x, y = (torch.randn(9, decoder.config.hidden_size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.rand(9, dtype=torch.float64)
    loss = losses.head_loss(decoder, x, weights, losses.taught(teacher, y.detach(), temperature))
    student = ((decoder.norm(x) @ decoder.embed_tokens.weight.T) / temperature).log_softmax(-1)
    target = ((teacher.norm(y) @ teacher.embed_tokens.weight.T) / temperature).softmax(-1).detach()
    plain = (kl_div(student, target, reduction="none").sum(-1) * weights).sum() * temperature**2
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-7)  # a model's head answers in float32
    same(torch.autograd.grad(loss, [x]), torch.autograd.grad(plain, [x]), 1e-5)


@pytest.mark.parametrize("dense", [True, False])
def test_who_learns_from_what(decoder: Decoder, dense: bool) -> None:
    """The indexers' loss reaching the base model, or the language model's the indexers."""
    batch = Batch.packed(IDS, dense=dense)
    watch = losses.IndexLoss(torch.ones(63, dtype=torch.float64))
    x, _ = decoder.trunk(batch, watch=watch)
    language = losses.head_loss(decoder, x, torch.ones(63), losses.next_token(batch.ids_T.roll(-1)))
    indexers = indexer_parameters(decoder)
    base = [p for p in decoder.parameters() if p not in indexers and p.requires_grad]
    assert isinstance(watch.total, Tensor)
    assert all(g is None for g in torch.autograd.grad(watch.total, base, allow_unused=True, retain_graph=True))
    assert all(g is None for g in torch.autograd.grad(language, list(indexers), allow_unused=True, retain_graph=True))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(watch.total, list(indexers), retain_graph=True))
    assert all(g.isfinite().all() for g in torch.autograd.grad(language, base))


def test_sparse_gradients_by_differences() -> None:
    """The whole model's gradient through the gather, against finite differences along a random direction."""
    # Without experts, whose router computes in float32.
    decoder = sparse_decoder(torch.float64, first_k_dense_replace=2)
    batch = Batch.packed(IDS)
    indexers = indexer_parameters(decoder)
    # The last layer's: what it selects from does not move with most of them.
    base = [p for name, p in decoder.named_parameters() if name.startswith(("layers.1", "norm")) and p not in indexers]

    def loss() -> Tensor:
        x, _ = decoder.trunk(batch)
        return losses.head_loss(decoder, x, torch.ones(63), losses.next_token(batch.ids_T.roll(-1)))

    gradients = torch.autograd.grad(loss(), base)
    directions = [torch.randn_like(p) for p in base]
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    step, values = 1e-5, []
    chosen = selections(decoder, batch)
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(base, directions, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(loss())
            assert all(torch.equal(a, b) for a, b in zip(chosen, selections(decoder, batch), strict=True))
            for p, d in zip(base, directions, strict=True):
                p.sub_(d, alpha=sign * step)
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), expected, rtol=1e-3, atol=1e-2)  # rope is float32


def test_short_sequences_beside_long_ones(decoder: Decoder) -> None:
    """A batch in which some sequences are no longer than top-k: the others' rows, which do not begin at 0."""
    ids = [torch.tensor([5]), torch.arange(5) + 2, IDS[0], torch.tensor([7]), IDS[1]]
    base = [p for p in decoder.parameters() if p.requires_grad and p not in indexer_parameters(decoder)]

    def gradients(sequences: list[Tensor]) -> list[Tensor]:
        batch = Batch.packed(sequences)
        x, _ = decoder.trunk(batch)
        weights = torch.ones(len(batch.ids_T))
        loss = losses.head_loss(decoder, x, weights, losses.next_token(batch.ids_T))
        return list(torch.autograd.grad(loss, base))

    apart = [gradients([sequence]) for sequence in ids]
    same(gradients(ids), [torch.stack(parts).sum(0) for parts in zip(*apart, strict=True)], 1e-5)


def selections(decoder: Decoder, batch: Batch) -> list[Tensor]:
    with torch.no_grad():
        return list(decoder.trunk(replace(batch, collect=frozenset({"selection"})))[1]["selection"])


def test_activation_checkpoints_change_nothing(decoder: Decoder) -> None:
    """A layer that, computed again, sees a later layer's selection."""
    again = sparse_decoder(torch.float64, checkpoint_activations=True)
    batch, gradients = Batch.packed(IDS), []
    for model in (decoder, again):
        watch = losses.IndexLoss(torch.ones(63, dtype=torch.float64))
        x, _ = model.trunk(batch, watch=watch)
        loss = losses.head_loss(model, x, torch.ones(63), losses.next_token(batch.ids_T.roll(-1)))
        learning = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(loss + watch.total, learning))
    same(*gradients)


def test_balance() -> None:
    """Even use must cost exactly 1 a token, and uneven use more; the gradient pulls towards rare experts."""
    config = RouterConfig("softmax", normalise=True)
    even = 9 * torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1], [0, 1, 1, 0]])
    assert float(losses.balance_loss(even, 2, (0, 4), config)) == pytest.approx(4)
    logits = torch.tensor([[3.0, 0.1, 0, 0]] * 4, requires_grad=True)
    loss = losses.balance_loss(logits, 2, (0, 4), config)
    loss.backward()
    assert logits.grad is not None and loss > 4 and (logits.grad[:, 0] > 0).all() and (logits.grad[:, 2] < 0).all()


def test_move_bias() -> None:
    """A bias that moves towards busy experts, or drifts as a whole."""
    bias = torch.zeros(4)
    losses.move_bias(bias, torch.tensor([9, 1, 5, 5]), 0.01)
    assert bias[0] < bias[2] < bias[1] and abs(float(bias.sum())) < 1e-7


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...], tolerance: float = 1e-9) -> None:
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)

"""The losses against their plain definitions, and the router's balance."""

import pytest
import torch
import torch.nn.functional as F
from tiny import CopySource, tiny_model

from openm3.train.data import Sample, pack
from openm3.train.losses import balance_routers, forward, language_loss, mean_loss, router_biases, sample_queries


@pytest.mark.parametrize("logits_at_once", [1, 48 * 7, 1 << 26])
def test_chunked_cross_entropy_equals_the_plain_one_forward_and_backward(logits_at_once):
    model, batch = tiny_model(), CopySource().batch(0)
    hidden = forward(model, batch, msa="dense").hidden.detach().requires_grad_()
    plain = F.cross_entropy(model.logits(hidden), batch.labels, ignore_index=-100, reduction="sum")
    expected = torch.autograd.grad(plain, [hidden, model.embed.weight])
    loss = language_loss(model, hidden, batch, logits_at_once=logits_at_once)
    found = torch.autograd.grad(loss, [hidden, model.embed.weight])
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_without_targets_has_no_loss():
    model, batch = tiny_model(), pack([Sample([1, 2, 3], [False] * 3)], 8)
    loss = language_loss(model, forward(model, batch, msa="dense").hidden, batch)
    loss.backward()
    assert loss.item() == 0.0


def test_mean_loss_weighs_targets_equally_over_uneven_batches():
    model = tiny_model()
    batches = [pack([Sample(list(range(n)), [True] * n)], 64) for n in (3, 20)]
    each = [mean_loss(model, [batch]) for batch in batches]
    assert mean_loss(model, batches) == pytest.approx((2 * each[0] + 19 * each[1]) / 21, rel=1e-5)


def test_sampled_queries_are_distinct_positions_fixed_by_seed_and_index_half_of_them_with_a_target():
    batch = CopySource().batch(0)
    queries = sample_queries(1, 2, batch, 30)
    assert torch.equal(queries, sample_queries(1, 2, batch, 30))
    assert not torch.equal(queries, sample_queries(1, 3, batch, 30))
    assert queries.tolist() == sorted(set(queries.tolist()))
    assert len(queries) == 30
    assert 0 <= queries[0] <= queries[-1] < batch.tokens
    assert len(set(queries.tolist()) & set(batch.loss_positions.tolist())) >= 15
    assert sample_queries(1, 2, batch, batch.tokens) is None
    assert sample_queries(1, 2, batch, None) is None
    silent = pack([Sample([1] * 50, [False] * 50)], 50)
    assert len(sample_queries(1, 2, silent, 30)) == 30


def test_balancing_raises_the_idle_experts_and_lowers_the_busy_ones():
    biases = [torch.zeros(4), torch.ones(4)]
    balance_routers(biases, torch.tensor([[8.0, 0.0, 4.0, 4.0], [1.0, 1.0, 1.0, 5.0]]), rate=0.5)
    assert biases[0].tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert biases[1].tolist() == [1.5, 1.5, 1.5, 0.5]


def test_balancing_evens_the_load_of_a_lopsided_router():
    model, source = tiny_model(), CopySource()
    with torch.no_grad():
        model.layers[1].mlp.router.bias[0] = 1.0  # as if every token's favourite were expert 0
    biases = router_biases(model)
    assert len(biases) == 1
    loads = []
    for index in range(300):
        with torch.no_grad():
            loads.append(forward(model, source.batch(index), msa="dense").router_load)
        balance_routers(biases, loads[-1], rate=0.01)
    first, last = (sum(part) / 20 for part in (loads[:20], loads[-20:]))
    assert first.max() > 1.9 * first.mean()  # expert 0 is in every token's two
    assert last.max() < 1.2 * last.mean()
    assert last.min() > 0.8 * last.mean()

"""The sampler against a plain full sort, its distribution, and its independence of the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openm3.engine import sampler
from openm3.engine.request import Request, RequestError, SamplingParams
from openm3.engine.sampler import adjust, logprobs_of, uniform


def sample(*args) -> list[int]:
    return sampler.sample(*args).tolist()


def params(temperature=1.0, top_p=1.0, top_k=0, **more):
    return SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, **more)


def sorted_oracle(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """The distribution [V] by the definition: sort everything, keep, normalize."""
    logits = logits.double() / p.temperature
    probs = logits.softmax(-1)
    logits = logits.masked_fill(probs < p.min_p * probs.max(), -torch.inf)
    if p.top_k:
        lowest = logits.sort(descending=True).values[min(p.top_k, len(logits)) - 1]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    probs = logits.softmax(-1)
    ordered = probs.sort(descending=True).values
    before = ordered.cumsum(-1) - ordered
    probs = probs.masked_fill(probs < ordered[before < p.top_p].min(), 0)
    return probs / probs.sum()


def drawn_distribution(logits: torch.Tensor, p: SamplingParams, n: int = 4000) -> torch.Tensor:
    """How often each token is drawn, over n evenly spaced points instead of random ones."""
    counts = torch.zeros(len(logits))
    rows = logits.expand(n, -1)
    points = iter([(i + 0.5) / n for i in range(n)])
    original, sampler.uniform = sampler.uniform, lambda seed, place: next(points)
    try:
        for token in sample(rows, [p] * n, [0] * n, [0] * n):
            counts[token] += 1
    finally:
        sampler.uniform = original
    return counts / n


@pytest.mark.parametrize(
    "p",
    [params(), params(0.5), params(2.0, top_k=3), params(top_p=0.6), params(0.7, 0.9, 8), params(top_k=500),
     params(top_k=1), params(top_p=1e-6), params(1.0, 0.95, 40), params(min_p=0.1), params(1.4, 0.9, 9, min_p=0.05)],
    ids=str,
)  # fmt: skip
def test_tokens_come_as_often_as_a_full_sort_says(p):
    logits = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 2
    assert (drawn_distribution(logits, p) - sorted_oracle(logits, p)).abs().max() < 1 / 4000 + 1e-6


@settings(deadline=None)
@given(st.data())
def test_a_draw_is_in_the_kept_set_of_a_full_sort_and_ties_are_kept_together(data):
    values = data.draw(st.lists(st.integers(-6, 6), min_size=1, max_size=30))
    logits = torch.tensor(values, dtype=torch.float32)
    top_p = data.draw(st.sampled_from([0.1, 0.35, 0.8, 0.99, 1.0]))
    p = params(data.draw(st.sampled_from([0.3, 1.0, 3.0])), top_p, data.draw(st.integers(0, 32)))
    seeds = list(range(20))
    oracle = sorted_oracle(logits, p)
    tokens = sample(logits.expand(20, -1), [p] * 20, seeds, [0] * 20)
    assert all(oracle[t] > 0 for t in tokens)


def test_the_nucleus_is_exact_where_the_first_guess_holds_too_little(monkeypatch):
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(2)) * 0.01  # nearly flat: 0.9 needs ~4500 tokens
    p = params(top_p=0.9)
    monkeypatch.setattr(sampler, "NUCLEUS_GUESS", 4)
    seeds = list(range(500))
    few = sample(logits.expand(500, -1), [p] * 500, seeds, [0] * 500)
    monkeypatch.setattr(sampler, "NUCLEUS_GUESS", 5000)
    assert few == sample(logits.expand(500, -1), [p] * 500, seeds, [0] * 500)
    oracle = sorted_oracle(logits, p)
    assert all(oracle[t] > 0 for t in few)
    assert len(set(few)) > 400


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_draw_is_the_same_alone_and_in_any_batch(data):
    n = data.draw(st.integers(1, 6))
    logits = torch.randn(n, 50, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) * 3
    choices = [params(0.0), params(), params(0.7, 0.9, 5), params(top_p=0.5), params(1.5, top_k=9)]
    ps = [data.draw(st.sampled_from(choices)) for _ in range(n)]
    seeds = [data.draw(st.integers(-5, 2**70)) for _ in range(n)]
    places = [data.draw(st.integers(0, 5000)) for _ in range(n)]
    together = sample(logits, ps, seeds, places)
    assert together == [sample(logits[i : i + 1], ps[i : i + 1], [seeds[i]], [places[i]])[0] for i in range(n)]


def test_temperature_zero_takes_the_highest_and_the_first_of_equals():
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, 0.0, -1.0]])
    assert sample(logits, [params(0.0)] * 2, [1, 2], [0, 0]) == [1, 0]


@pytest.mark.parametrize("temperature", [1e-5, 1e-45, 5e-324])
def test_a_temperature_that_would_overflow_the_logits_is_zero(temperature):
    logits = torch.tensor([[0.0, 30.0, 29.0], [-30.0, -torch.inf, -1.0]])
    assert sample(logits, [params(temperature)] * 2, [1, 2], [0, 0]) == [1, 2]


def test_minus_infinity_is_never_drawn():
    logits = torch.full((200, 9), -torch.inf)
    logits[:, 4] = 0.0
    assert set(sample(logits, [params()] * 200, list(range(200)), [0] * 200)) == {4}


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_place():
    numbers = torch.tensor([[uniform(seed, place) for place in range(200)] for seed in range(200)], dtype=torch.float64)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers.float(), bins=50, min=0, max=1)
    assert ((counts - 800) ** 2 / 800).sum() < 100  # chi-square with 49 degrees of freedom: 1e-5 of lying above 100
    for a, b in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):  # neighbours in seed, in place
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.025  # 5 sigma of 40,000
    assert uniform(7, 3) == uniform(7, 3)
    assert uniform(-1, 0) != uniform(1, 0)


def adjusted(logits: torch.Tensor, prompt: list[int], output: list[int], **fields) -> torch.Tensor:
    request = Request(prompt, params(0.0, **fields), 99)
    rows = torch.stack([logits, logits])
    adjust(rows, 1, request)
    if output:  # tokens come one by one, and the counts follow
        for token in output:
            request.token_ids.append(token)
            rows[1] = logits
            adjust(rows, 1, request)
    assert torch.equal(rows[0], logits)
    return rows[1]


def test_penalties_are_those_of_the_definition():
    logits = torch.tensor([2.0, -2.0, 1.0, -1.0, 0.5, 3.0])
    prompt, output = [0, 1], [2, 3, 3]
    wanted = logits.clone()
    for token in {0, 1, 2, 3}:
        wanted[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
    assert torch.allclose(adjusted(logits, prompt, output, repetition_penalty=1.5), wanted)
    wanted = logits - torch.tensor([0, 0, 0.4, 0.8, 0, 0]) - torch.tensor([0, 0, 0.7, 0.7, 0, 0])
    found = adjusted(logits, prompt, output, frequency_penalty=0.4, presence_penalty=0.7)
    assert torch.allclose(found, wanted)
    assert torch.equal(adjusted(logits, prompt, output), logits)


def test_a_bias_is_added_and_one_beyond_the_vocabulary_is_nothing():
    found = adjusted(torch.zeros(4), [0], [], logit_bias={1: 5, 3: -100, 9: 7})
    assert found.tolist() == [0, 5, 0, -100]


def test_log_probabilities_are_a_log_softmax_and_the_likeliest_come_first():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    wanted = logits.double().log_softmax(-1)
    for row, record in enumerate(logprobs_of(logits, [4, 5, 6], 3)):
        assert (record.token, record.logprob) == (4 + row, wanted[row, 4 + row].item())
        values, ids = wanted[row].sort(descending=True)
        assert record.top == tuple(zip(ids[:3].tolist(), values[:3].tolist(), strict=True))
    assert logprobs_of(logits, [0, 0, 0], 0)[0].top == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [("min_p", 1.5), ("repetition_penalty", 0), ("presence_penalty", 3), ("frequency_penalty", "x"), ("n", 0),
     ("logprobs", -1), ("prompt_logprobs", True), ("thinking_budget", 1.5), ("stop_token_ids", (-1,)),
     ("logit_bias", {"a": 1}), ("logit_bias", {1: 101}), ("repetition_penalty", 5e-324),
     ("temperature", 8e307)],
)  # fmt: skip
def test_a_parameter_out_of_its_range_is_refused_by_name(field, value):
    with pytest.raises(RequestError, match=f"^{field} = "):
        SamplingParams(**{field: value})


def test_none_is_the_default_of_what_has_one():
    assert SamplingParams(min_p=None, repetition_penalty=None, logit_bias=None, n=None) == SamplingParams()

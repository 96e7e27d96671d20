"""The plain-torch stand-ins, compared with slow loops."""

from __future__ import annotations

import pytest
import torch

from rollout.sglang.cpu import kernels as cpu_kernels
from rollout.sglang.cpu.kernels import decode_attention, extend_attention, seeded_multinomial, seeded_uniform

HEADS, KV_HEADS, HEAD_SIZE, SLOTS = 6, 2, 4, 200


def make_cache(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Sequences scattered over the slots of a cache; rows of the table hold other slots beyond their length."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(SLOTS, (10, 60), generator=generator, dtype=torch.int32)
    rows = torch.randperm(10, generator=generator)[: len(lengths)]
    slots = torch.randperm(SLOTS, generator=generator)
    at = 0
    for row, length in zip(rows.tolist(), lengths, strict=True):
        table[row, :length] = slots[at : at + length].int()
        at += length
    return {
        "k_cache": torch.randn(SLOTS, KV_HEADS, HEAD_SIZE, generator=generator),
        "v_cache": torch.randn(SLOTS, KV_HEADS, HEAD_SIZE, generator=generator),
        "req_to_token": table,
        "req_pool_indices_N": rows,
    }


def attend(query: torch.Tensor, cache: dict[str, torch.Tensor], sequence: int, num_seen: int, scaling: float) -> torch.Tensor:
    """One query token [H, D] to the first `num_seen` tokens of a sequence, head by head in float64."""
    slots = cache["req_to_token"][cache["req_pool_indices_N"][sequence], :num_seen].long()
    output = torch.empty(HEADS, HEAD_SIZE, dtype=torch.float64)
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        keys, values = cache["k_cache"][slots, kv_head].double(), cache["v_cache"][slots, kv_head].double()
        output[head] = (keys @ query[head].double() * scaling).softmax(0) @ values
    return output


@pytest.fixture(params=[2**24, 100], ids=["one chunk", "a chunk per sequence"])
def chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "MAX_GATHERED_NUMBERS", request.param)


@pytest.mark.usefixtures("chunk_size")
def test_decode_attention_equals_a_loop_over_sequences_and_heads() -> None:
    lengths = [1, 17, 5, 40]
    cache = make_cache(lengths)
    query = torch.randn(len(lengths), HEADS, HEAD_SIZE)
    output = decode_attention(query, seq_lens_N=torch.tensor(lengths), scaling=0.3, **cache)
    expected = torch.stack([attend(query[i], cache, i, length, 0.3) for i, length in enumerate(lengths)])
    assert torch.allclose(output.double(), expected, atol=1e-6)


@pytest.mark.usefixtures("chunk_size")
def test_extend_attention_equals_a_loop_over_tokens() -> None:
    prefixes, extends = [0, 7, 3, 12], [5, 1, 9, 4]
    lengths = [prefix + extend for prefix, extend in zip(prefixes, extends, strict=True)]
    cache = make_cache(lengths)
    query = torch.randn(sum(extends), HEADS, HEAD_SIZE)
    output = extend_attention(
        query,
        seq_lens_N=torch.tensor(lengths),
        prefix_lens_N=torch.tensor(prefixes),
        extend_lens_N=torch.tensor(extends),
        scaling=0.5,
        **cache,
    )
    expected, row = [], 0
    for sequence, (prefix, extend) in enumerate(zip(prefixes, extends, strict=True)):
        for token in range(extend):
            expected.append(attend(query[row], cache, sequence, prefix + token + 1, 0.5))
            row += 1
    assert torch.allclose(output.double(), torch.stack(expected), atol=1e-6)


def test_seeded_uniform_is_uniform_over_neighbouring_seeds_and_positions() -> None:
    seeds, positions = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    values = seeded_uniform(seeds.reshape(-1), positions.reshape(-1))
    assert float(values.min()) >= 0 and float(values.max()) < 1
    counts = torch.histc(values, bins=100, min=0, max=1)
    assert float(((counts - 900) ** 2 / 900).sum()) < 99 + 4 * (2 * 99) ** 0.5  # chi-square, 99 degrees of freedom
    grid = values.reshape(300, 300) - 0.5
    for neighbour in (grid.roll(1, 0), grid.roll(1, 1), grid.roll((1, -1), (0, 1))):
        assert abs(float((grid * neighbour).mean() / grid.var())) < 4 / 300  # correlation of 90,000 pairs: standard deviation 1/300


@pytest.mark.parametrize("vocab_size", [6, 1000], ids=["one block", "four blocks"])
def test_seeded_draws_follow_the_probabilities_and_exclude_tokens(vocab_size: int) -> None:
    num_draws = 50_000
    weights = torch.zeros(vocab_size)
    places = torch.tensor([1, vocab_size // 2, vocab_size - 2])
    weights[places] = torch.tensor([1.0, 0.4, 0.6])
    drawn = seeded_multinomial(weights.expand(num_draws, -1), torch.arange(num_draws), torch.full((num_draws,), 17))
    frequency = torch.bincount(drawn[:, 0], minlength=vocab_size) / num_draws
    assert frequency[weights == 0].sum() == 0
    assert torch.allclose(frequency[places], torch.tensor([0.5, 0.2, 0.3]), atol=0.01)  # standard deviation 0.0022


def test_seeded_multinomial_inverts_the_cumulative_distribution() -> None:
    torch.manual_seed(0)
    weights = torch.rand(500, 1003) ** 8
    seeds, positions = torch.arange(500), torch.arange(500) % 7
    expected = [
        next(v for v, total in enumerate(row.double().cumsum(0).tolist()) if total > u * float(row.double().sum()))
        for row, u in zip(weights, seeded_uniform(seeds, positions).tolist(), strict=True)
    ]
    assert seeded_multinomial(weights, seeds, positions)[:, 0].tolist() == expected


def test_seeded_multinomial_ignores_the_rest_of_the_batch() -> None:
    weights = torch.randn(20, 1000).softmax(-1)
    seeds, positions = torch.arange(20) * 1000, torch.arange(20)
    together = seeded_multinomial(weights, seeds, positions)
    alone = torch.cat([seeded_multinomial(weights[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(20)])
    assert torch.equal(together, alone)

"""Chunked, vocab-parallel log-probs against float64 log_softmax, values and gradients; two gloo ranks against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.logprobs import token_logprobs
from tests.rank_pool import RankPool

TOKENS, HIDDEN, VOCAB, PADDED = 23, 16, 37, 40


def inputs(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator)
    upstream[3] = 0.0
    return hidden, weight, labels, upstream


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, temperature: float) -> tuple[Tensor, ...]:
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    table = (hidden @ weight[:VOCAB].t() / temperature).log_softmax(-1)
    logprobs = table[torch.arange(len(labels)), labels]
    entropy = -(table.exp() * table).sum(-1)
    grads = torch.autograd.grad((logprobs * upstream.double()).sum(), (hidden, weight))
    return logprobs.detach(), entropy.detach(), *grads


def several(seed: int) -> tuple[Tensor, Tensor]:
    """Five labels of each token, of which the last four differ and one may be the first, and what comes back to each."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.stack([torch.randperm(VOCAB, generator=generator)[:4] for _ in range(TOKENS)])
    first = torch.where(torch.arange(TOKENS) % 2 == 0, others[:, 1], torch.randint(0, VOCAB, (TOKENS,), generator=generator))
    return torch.cat([first[:, None], others], 1), torch.randn(TOKENS, 5, generator=generator)


def reference_of_several(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, temperature: float) -> tuple[Tensor, ...]:
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logprobs = (hidden @ weight[:VOCAB].t() / temperature).log_softmax(-1).gather(1, labels)
    return logprobs.detach(), *torch.autograd.grad((logprobs * upstream.double()).sum(), (hidden, weight))


def options(**changed: object) -> dict:
    return {"vocab_size": VOCAB, "temperature": 1.0, "tp_group": None, "chunk_tokens": 8, "with_entropy": True} | changed


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 23, 100])
def test_values_and_gradients_equal_float64_log_softmax(temperature: float, chunk_tokens: int) -> None:
    hidden, weight, labels, upstream = inputs()
    expected = reference(hidden, weight, labels, upstream, temperature)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, labels, **options(temperature=temperature, chunk_tokens=chunk_tokens))
    grads = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))
    assert logprobs.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    for got, want in zip((logprobs, entropy, *grads), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)  # fp32 sums of 16 and 37 terms of size about 10
    assert grads[1][VOCAB:].eq(0).all(), "padded vocabulary rows take no gradient"
    assert grads[0][3].eq(0).all(), "a token without upstream gradient gives none"


@pytest.mark.parametrize("chunk_tokens", [1, 8, 100])
def test_several_labels_of_a_token_share_one_softmax(chunk_tokens: int) -> None:
    hidden, weight, _, _ = inputs(seed=3)
    labels, upstream = several(3)
    expected = reference_of_several(hidden, weight, labels, upstream, 0.6)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, labels, **options(temperature=0.6, chunk_tokens=chunk_tokens))
    grads = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))
    for got, want in zip((logprobs, *grads), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        alone, entropy_alone = token_logprobs(hidden, weight, labels[:, 0], **options(temperature=0.6, chunk_tokens=chunk_tokens))
    assert torch.equal(alone, logprobs[:, 0]) and torch.equal(entropy_alone, entropy), "to the last bit those of the first label alone"


def test_large_logits_neither_overflow_nor_lose_the_entropy() -> None:
    hidden, weight, labels, upstream = inputs(scale=300.0)
    expected = reference(hidden, weight, labels, upstream, 1.0)
    logprobs, entropy = token_logprobs(hidden, weight, labels, **options())
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-5, atol=1e-2)  # logits of 3000 have steps of 2e-4 in fp32
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-3, atol=1e-3)
    assert entropy.isfinite().all() and logprobs.isfinite().all()


def test_a_vocabulary_of_many_blocks_of_exponentials_equals_float64() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(5, 4, generator=generator), torch.randn(20_000, 4, generator=generator)
    labels = torch.tensor([0, 8191, 8192, 16_384, 19_999])
    logprobs, entropy = token_logprobs(hidden, weight, labels, **options(vocab_size=20_000, chunk_tokens=2))
    table = (hidden.double() @ weight.double().t()).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), table[torch.arange(5), labels], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(table.exp() * table).sum(-1), rtol=1e-6, atol=1e-6)


def test_bf16_inputs_get_fp32_logits() -> None:
    hidden, weight, labels, upstream = inputs(seed=1)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    expected = reference(hidden, weight, labels, upstream, 1.0)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, labels, **options())
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-5, atol=1e-5)  # a bf16 logit alone would be 0.03 off
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))
    for got, want in zip(grads, expected[2:], strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)  # bf16 keeps 8 bits


def test_only_the_wanted_gradients_are_computed_and_entropy_is_optional() -> None:
    hidden, weight, labels, upstream = inputs()
    logprobs, entropy = token_logprobs(hidden.requires_grad_(), weight, labels, **options(with_entropy=False))
    assert entropy is None
    (grad,) = torch.autograd.grad((logprobs * upstream).sum(), hidden)
    torch.testing.assert_close(grad.double(), reference(hidden.detach(), weight, labels, upstream, 1.0)[2], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not token_logprobs(hidden, weight, labels, **options())[0].requires_grad


def test_no_buffer_of_tokens_times_vocabulary_outlives_a_chunk() -> None:
    """The largest tensor autograd keeps, and the largest made on the way, stay at chunk size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    hidden, weight = torch.randn(512, 4, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    labels = torch.randint(0, 64, (512,))
    with Watch():
        logprobs, _ = token_logprobs(hidden, weight, labels, **options(vocab_size=64, chunk_tokens=16))
        logprobs.sum().backward()
    assert largest <= max(16 * 64, 3 * 512, 512 * 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"vocab_size": 41}, "vocab_size is 41; 1 ranks with 40 rows each hold 1 to 40"),
        ({"vocab_size": 5}, r"labels spans .* expected token ids in \[0, 5\)"),
    ],
)
def test_bad_options_are_named(change: dict, message: str) -> None:
    hidden, weight, labels, _ = inputs()
    with pytest.raises(ValueError, match=message):
        token_logprobs(hidden, weight, labels, **options(**change))


@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_tensors_are_named() -> None:
    hidden, weight, labels, _ = inputs()
    with pytest.raises(ValueError, match="both be float32 or both bfloat16"):
        token_logprobs(hidden.bfloat16(), weight, labels, **options())
    with pytest.raises(ValueError, match=r"labels \[T\] or \[T, L\]; got \[23, 16\], \[40, 16\], \[22\]"):
        token_logprobs(hidden, weight, labels[1:], **options())
    with pytest.raises(ValueError, match="labels must be int64"):
        token_logprobs(hidden, weight, labels.int(), **options())


@pytest.mark.ranks
def test_two_vocab_parallel_ranks_equal_float64_also_with_padding_alone(ranks: RankPool, tmp_path: Path) -> None:
    hidden, weight, labels, upstream = inputs(seed=2)
    of_several = dict(zip(("labels_of_several", "upstream_of_several"), several(2), strict=True))
    torch.save({"hidden": hidden, "weight": weight, "labels": labels, "upstream": upstream, **of_several}, tmp_path / "input.pt")
    ranks.run(Path(__file__).with_name("logprobs_ranks.py"), tmp_path, world_size=2)
    outs = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    logprobs, entropy, grad_hidden, grad_weight = reference(hidden, weight, labels, upstream, 0.7)
    close = {"rtol": 1e-5, "atol": 1e-5}
    for out in outs:
        torch.testing.assert_close(out["logprobs"].double(), logprobs, **close)
        torch.testing.assert_close(out["entropy"].double(), entropy, **close)
        assert out["collectives"] == {"forward": ["all_reduce", "all_reduce"], "backward": []}
        assert out["lopsided"]["finite"] and torch.equal(out["lopsided"]["logprobs"], outs[0]["lopsided"]["logprobs"])
        torch.testing.assert_close(out["lopsided"]["logprobs"], out["lopsided"]["alone"], **close)
        torch.testing.assert_close(out["lopsided"]["entropy"], out["lopsided"]["alone_entropy"], **close)
    torch.testing.assert_close((outs[0]["grad_hidden"] + outs[1]["grad_hidden"]).double(), grad_hidden, **close)
    torch.testing.assert_close(torch.cat([out["grad_weight"] for out in outs]).double(), grad_weight, **close)

    logprobs, grad_hidden, grad_weight = reference_of_several(hidden, weight, *of_several.values(), 0.7)
    found = [out["several"] for out in outs]
    for each in found:
        torch.testing.assert_close(each["logprobs"].double(), logprobs, **close)
        assert each["collectives"] == {"forward": ["all_reduce", "all_reduce"], "backward": []}
    torch.testing.assert_close((found[0]["grad_hidden"] + found[1]["grad_hidden"]).double(), grad_hidden, **close)
    torch.testing.assert_close(torch.cat([each["grad_weight"] for each in found]).double(), grad_weight, **close)

"""Responses, log-probs, versions and weights of a real SGLang server."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from rollout.client import GenerationClient, RolloutFailed, WeightsMissing
from rollout.records import Generation, GenerationRequest, SamplingParams, Sinks
from rollout.sglang.control import ServerRefused, weight_version
from rollout.sglang.server import ServerPool, ServerSettings
from rollout.weights.checksums import ChecksumMismatch, check_equal, expected_checksums
from rollout.weights.collective import CollectiveWeightSync
from rollout.weights.disk import DiskWeightSync
from rollout.weights.weight_sync import WeightSync, WeightSyncFailed
from tests.rollout import model_reference as reference
from tests.rollout.conftest import VOCAB_SIZE, make_model

pytestmark = pytest.mark.servers

REQUESTS = [GenerationRequest(request_id=f"prompt{i}", prompt_token_ids=tuple(range(3 + i, 9 + 2 * i))) for i in range(5)]


def sampling(**changes: object) -> SamplingParams:
    values = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "stop_token_ids": (), "seed": 7, **changes}
    return SamplingParams(**values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def client(server_pool: ServerPool) -> GenerationClient:
    return GenerationClient(server_pool.endpoints, request_timeout_s=60, max_retries=1, max_in_flight=1000)


@pytest.fixture(scope="module")
def collective(server_pool: ServerPool) -> Iterator[CollectiveWeightSync]:
    sync = CollectiveWeightSync(server_pool.endpoints, backend="gloo", bucket_bytes=20_000)
    yield sync
    sync.close()


@pytest.fixture(params=["disk", "collective"])
def sync(
    request: pytest.FixtureRequest, server_pool: ServerPool, collective: CollectiveWeightSync, model_folder: Path, tmp_path: Path
) -> WeightSync:
    if request.param == "collective":
        return collective

    def write_checkpoint(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        folder.mkdir(parents=True)
        save_file(dict(tensors), folder / "model.safetensors")
        (folder / "config.json").write_text((model_folder / "config.json").read_text())

    return DiskWeightSync(server_pool.endpoints, write_checkpoint=write_checkpoint, directory=tmp_path / "versions")


def test_a_server_does_not_import_the_models_it_cannot_serve(server_pool: ServerPool) -> None:
    """SGLang reports each of its models that cannot be imported here: importing all of them takes seconds."""
    log = server_pool.processes[0].log_path.read_text()
    assert "server_args" in log and "Ignore import error" not in log


def test_every_request_gets_exactly_its_samples_in_order(client: GenerationClient) -> None:
    seen = []
    rows = client.generate(REQUESTS, sampling(), num_samples=3, on_generation=lambda request, generation: seen.append(generation))
    assert [[generation.request_id for generation in row] for row in rows] == [[request.request_id] * 3 for request in REQUESTS]
    assert sorted(map(id, seen)) == sorted(id(generation) for row in rows for generation in row)
    for request, row in zip(REQUESTS, rows, strict=True):
        for generation in row:
            assert generation.prompt_token_ids == request.prompt_token_ids
            assert 1 <= len(generation.response_token_ids) <= 12
            assert (generation.finish_reason == "length") == (generation.response_token_ids[-1] != 1)
            assert generation.finish_reason == "stop" or len(generation.response_token_ids) == 12
            assert generation.num_retries == 0


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_engine_logprobs_equal_those_of_transformers(client: GenerationClient, base_model: Qwen3MoeForCausalLM, temperature: float) -> None:
    rows = client.generate(REQUESTS, sampling(temperature=temperature), num_samples=4)
    generations = [generation for row in rows for generation in row]
    # float32 sums in another order: a few 1e-6 here; 1e-4 is a hundred times less than any real difference would be.
    assert reference.largest_difference(base_model, generations, temperature=temperature) < 1e-4


class Experts:
    """A RouteSink: what the server said of each answer, [tokens, layers, 2]."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def keep(self, ids: bytes, *, num_inputs: int) -> int:
        self.kept.append(torch.frombuffer(bytearray(ids), dtype=torch.int32).view(num_inputs, -1, 2))
        return len(self.kept) - 1


class Likeliest:
    """A TopTokenSink: ids and log-probs of each answer, [tokens, top_k]."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.kept: list[tuple[Tensor, Tensor]] = []

    def keep(self, ids: np.ndarray, logprobs: np.ndarray) -> int:
        self.kept.append((torch.tensor(ids), torch.tensor(logprobs)))
        return len(self.kept) - 1


def ask_with(client: GenerationClient, sinks: Sinks, params: SamplingParams, *, num_samples: int) -> list[Generation]:
    requests = [dataclasses.replace(request, sample_index=index) for request in REQUESTS for index in range(num_samples)]

    async def ask() -> list[Generation]:
        async with client.session(params, policy_version=None, sinks=sinks) as session:
            return await session.generate(requests)

    return client.run(ask())


def ask_with_experts(client: GenerationClient, sink: Experts, params: SamplingParams, *, num_samples: int) -> list[Generation]:
    return ask_with(client, Sinks(routes=sink), params, num_samples=num_samples)


@pytest.mark.parametrize(("temperature", "top_k"), [(0.6, 7), (1.5, VOCAB_SIZE)])
def test_the_likeliest_tokens_are_those_of_transformers(
    temperature: float, top_k: int, client: GenerationClient, base_model: Qwen3MoeForCausalLM
) -> None:
    sink, experts = Likeliest(top_k), Experts()
    params = sampling(temperature=temperature, stop_token_ids=(2, 3, 4))
    generations = ask_with(client, Sinks(routes=experts, top=sink), params, num_samples=3)
    assert {len(generation.response_token_ids) for generation in generations} >= {12} and len(experts.kept) == len(generations)
    outside = 0
    for generation in generations:
        assert generation.top is not None
        ids, logprobs = sink.kept[generation.top]
        with torch.no_grad():
            fed = torch.tensor([generation.prompt_token_ids + generation.response_token_ids])
            logits = base_model(fed).logits[0, len(generation.prompt_token_ids) - 1 : -1].double()
        expected = (logits / temperature).log_softmax(-1)
        assert (ids.sort(-1).values.diff(dim=-1) > 0).all() and (logprobs.diff(dim=-1) <= 0).all()
        # By value: where two tokens tie to the last bits, rounding decides which one is in.
        torch.testing.assert_close(logprobs.double(), expected.topk(top_k).values, rtol=0, atol=1e-4)
        torch.testing.assert_close(logprobs.double(), expected.gather(1, ids.long()), rtol=0, atol=1e-4)
        sampled = ids == torch.tensor(generation.response_token_ids)[:, None]
        own = torch.tensor(generation.engine_logprobs, dtype=torch.float32)[sampled.any(1)]
        torch.testing.assert_close(logprobs[sampled], own, rtol=0, atol=1e-6)
        outside += int((~sampled.any(1)).sum())
    assert (outside == 0) == (top_k == VOCAB_SIZE), "some tokens that were drawn are not among the likeliest 7"


def test_the_server_tells_which_experts_every_token_visited(client: GenerationClient, base_model: Qwen3MoeForCausalLM) -> None:
    sink = Experts()
    generations = ask_with_experts(client, sink, sampling(stop_token_ids=(2, 3, 4)), num_samples=4)
    assert {len(generation.response_token_ids) for generation in generations} >= {1, 12}
    for generation in generations:
        assert generation.routes is not None
        with torch.no_grad():
            fed = torch.tensor([generation.prompt_token_ids + generation.response_token_ids[:-1]])
            router_logits = base_model(fed, output_router_logits=True).router_logits
        expected = torch.stack([logits.topk(2).indices for logits in router_logits], 1)
        assert sink.kept[generation.routes].sort(-1).values.equal(expected.sort(-1).values.int())  # a set: the order means nothing


def test_same_seed_same_responses_to_the_last_bit_another_seed_others(client: GenerationClient) -> None:
    first, again, other = (
        [(g.response_token_ids, *g.engine_logprobs) for row in client.generate(REQUESTS, sampling(seed=seed), num_samples=4) for g in row]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert len(set(first)) > len(REQUESTS), "samples of one request must differ from each other"


def test_sampled_first_tokens_follow_the_model_distribution(client: GenerationClient, base_model: Qwen3MoeForCausalLM) -> None:
    num_samples = 600
    [row] = client.generate(REQUESTS[:1], sampling(max_new_tokens=1), num_samples=num_samples)
    counts = torch.zeros(base_model.config.vocab_size, dtype=torch.float64)
    for generation in row:
        counts[generation.response_token_ids[0]] += 1
    with torch.no_grad():
        expected = base_model(torch.tensor([REQUESTS[0].prompt_token_ids])).logits[0, -1].double().softmax(-1) * num_samples
    rare = expected < 5  # the chi-square approximation needs a few expected counts in every cell: rare tokens share one
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert degrees > 5
    # Mean: the degrees of freedom; variance: twice that. The seed is fixed, so this cannot flicker.
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_stop_token_ends_a_response_and_is_part_of_it(client: GenerationClient) -> None:
    stops = tuple(range(2, 40))
    rows = client.generate(REQUESTS, sampling(stop_token_ids=stops), num_samples=2)
    assert {len(generation.response_token_ids) for row in rows for generation in row if generation.response_token_ids[0] != 0} == {1}


def test_prompt_that_the_model_cannot_hold_names_request_and_reason(client: GenerationClient, server_pool: ServerPool) -> None:
    too_long = GenerationRequest(request_id="too-long", prompt_token_ids=(3,) * 300)
    with pytest.raises(RolloutFailed, match=r"127\.0\.0\.1.*too-long#0.*(300|length)"):
        client.generate([too_long], sampling(), num_samples=1)


def test_published_weights_are_what_the_server_then_uses(
    sync: WeightSync, client: GenerationClient, server_pool: ServerPool, base_model: Qwen3MoeForCausalLM, tmp_path: Path
) -> None:
    [endpoint] = server_pool.endpoints
    new_model = make_model(11)
    sync.publish(5, reference.checkpoint_tensors(new_model, tmp_path / "new"))
    try:
        assert weight_version(endpoint, key=None, timeout_s=10) == "5"
        generations = [generation for row in client.generate(REQUESTS, sampling(), num_samples=2) for generation in row]
        assert {generation.policy_versions for generation in generations} == {(5, 5)}
        assert reference.largest_difference(new_model, generations) < 1e-4
        assert reference.largest_difference(base_model, generations) > 0.1
        check_equal(expected_checksums(reference.checkpoint_tensors(new_model, tmp_path / "again"), dtype=torch.float32), endpoint)
    finally:
        sync.publish(0, reference.checkpoint_tensors(base_model, tmp_path / "base"))
    check_equal(expected_checksums(reference.checkpoint_tensors(base_model, tmp_path / "base2"), dtype=torch.float32), endpoint)


@pytest.mark.parametrize(
    "changed", ["model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"]
)
def test_checksums_name_the_parameter_that_holds_one_changed_weight(
    server_pool: ServerPool, base_model: Qwen3MoeForCausalLM, tmp_path: Path, changed: str
) -> None:
    tensors = dict(reference.checkpoint_tensors(base_model, tmp_path))
    tensors[changed].view(-1)[3] += 1e-6
    server_name = {"up": "w13_weight", "k_": "qkv_proj", "no": "model.norm"}[changed.split(".")[-2][:2]]
    with pytest.raises(ChecksumMismatch, match=rf"1 of 21 parameters: \S*{server_name}\S* differs$"):
        check_equal(expected_checksums(iter(tensors.items()), dtype=torch.float32), server_pool.endpoints[0])


def test_update_that_leaves_a_tensor_out_is_refused_before_it_starts(
    server_pool: ServerPool, base_model: Qwen3MoeForCausalLM, tmp_path: Path
) -> None:
    sync = CollectiveWeightSync(server_pool.endpoints)
    tensors = (
        (name, tensor) for name, tensor in reference.checkpoint_tensors(base_model, tmp_path) if "layers.1.self_attn.o_proj" not in name
    )
    try:
        with pytest.raises(ValueError, match=r"never sent to the server: \['model\.layers\.1\.self_attn\.o_proj\.weight'\]"):
            sync.publish(3, tensors)
        assert weight_version(server_pool.endpoints[0], key=None, timeout_s=10) == "0"
    finally:
        sync.close()


def test_responses_in_flight_survive_an_update_and_tell_their_versions(
    collective: CollectiveWeightSync, client: GenerationClient, base_model: Qwen3MoeForCausalLM, tmp_path: Path
) -> None:
    tensors = list(reference.checkpoint_tensors(base_model, tmp_path))
    generations: list[Generation] = []
    # Ten times what the server runs at once: some responses are over, some half done and some not begun when the update comes.
    params = sampling(max_new_tokens=100)
    many = threading.Thread(target=lambda: generations.extend(ask_with_experts(client, Experts(), params, num_samples=128)))
    many.start()
    try:
        time.sleep(0.5)
        collective.publish(1, iter(tensors))
        many.join(60)
        assert len(generations) == 5 * 128
        assert {version for generation in generations for version in generation.policy_versions} == {0, 1}
        mixed = [generation for generation in generations if generation.policy_versions == (0, 1)]
        assert mixed and all(generation.routes is None for generation in mixed), "experts of tokens that were computed twice"
        assert sum(generation.routes is not None for generation in generations) > 128
        # The weights are the same ones under a new version number, so every token must still score as it was sampled.
        assert reference.largest_difference(base_model, mixed[:20] + generations[:20]) < 1e-4
    finally:
        collective.publish(0, iter(tensors))


def test_a_failed_step_leaves_the_server_paused_without_a_version(
    server_pool: ServerPool, base_model: Qwen3MoeForCausalLM, tmp_path: Path
) -> None:
    [endpoint] = server_pool.endpoints
    tensors = list(reference.checkpoint_tensors(base_model, tmp_path))
    sync = CollectiveWeightSync(server_pool.endpoints)
    sync.publish(0, iter(tensors))
    wrong = [(name, tensor[:1] if name == "model.norm.weight" else tensor) for name, tensor in tensors]
    with pytest.raises(WeightSyncFailed, match=r"policy version 9: no server took it.*127\.0\.0\.1.*update_weights_from_distributed"):
        sync.publish(9, iter(wrong))
    assert "unfinished update to 9" in weight_version(endpoint, key=None, timeout_s=10)
    with pytest.raises(WeightsMissing, match="unfinished update to 9"):
        gated = GenerationClient(server_pool.endpoints, request_timeout_s=60, max_retries=0, max_in_flight=10)
        gated.generate(REQUESTS[:1], sampling(), num_samples=1, policy_version=9)
    impatient = GenerationClient(server_pool.endpoints, request_timeout_s=1.5, max_retries=0, max_in_flight=10)
    with pytest.raises(RolloutFailed, match="ReadTimeout"):
        impatient.generate(REQUESTS[:1], sampling(), num_samples=1)
    assert sync.publish(0, iter(tensors)) == (endpoint,)
    sync.close()
    check_equal(expected_checksums(iter(tensors), dtype=torch.float32), endpoint)


def test_dense_model_with_tied_embeddings_answers_and_takes_weights_alike(tmp_path: Path) -> None:
    def make_dense(seed: int) -> Qwen3ForCausalLM:
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=70,  # neither this nor the width 40 is a multiple of what SGLang fills up to
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            eos_token_id=1,
            initializer_range=0.3,
            dtype="float32",
        )
        return Qwen3ForCausalLM(config).float().eval()

    make_dense(0).save_pretrained(tmp_path / "model")
    settings = ServerSettings(
        model_path=tmp_path / "model",
        device="cpu",
        tp=1,
        dtype="float32",
        seed=0,
        deterministic=True,
        policy_version=3,
        max_total_tokens=4096,
    )
    new_model = make_dense(1)
    with ServerPool.start(settings, num_servers=1, log_dir=tmp_path, start_timeout_s=240) as pool:
        client = GenerationClient(pool.endpoints, request_timeout_s=60, max_retries=0, max_in_flight=1000)
        generations = [generation for row in client.generate(REQUESTS, sampling(), num_samples=2) for generation in row]
        assert {generation.policy_versions for generation in generations} == {(3, 3)}
        assert reference.largest_difference(make_dense(0), generations) < 1e-4
        sync = CollectiveWeightSync(pool.endpoints)
        tensors = list(reference.checkpoint_tensors(new_model, tmp_path / "new"))
        assert "lm_head.weight" not in dict(tensors)
        sync.publish(4, iter(tensors))
        generations = [generation for row in client.generate(REQUESTS, sampling(), num_samples=2) for generation in row]
        assert reference.largest_difference(new_model, generations) < 1e-4
        check_equal(expected_checksums(tensors, dtype=torch.float32), pool.endpoints[0])
        head = ("lm_head.weight", dict(tensors)["model.embed_tokens.weight"])
        check_equal(expected_checksums([*tensors, head], dtype=torch.float32), pool.endpoints[0])
        sync.close()


def test_a_server_with_both_keys_works_and_refuses_wrong_ones(
    server_settings: ServerSettings, base_model: Qwen3MoeForCausalLM, tmp_path: Path
) -> None:
    (tmp_path / "api").write_text("api-key-of-the-test\n")
    (tmp_path / "admin").write_text("admin-key-of-the-test\n")
    settings = dataclasses.replace(server_settings, api_key_path=tmp_path / "api", admin_key_path=tmp_path / "admin")
    api, admin = {"api_key": settings.api_key}, {"admin_key": settings.admin_key}
    client_options = {"request_timeout_s": 60, "max_retries": 0, "max_in_flight": 1000}
    new_model = make_model(12)
    with ServerPool.start(settings, num_servers=1, log_dir=tmp_path / "logs", start_timeout_s=240) as pool:
        [endpoint] = pool.endpoints
        environments = [process.environ() for process in pool.processes[0].tree()]
        assert all(environment.get("MINPRO_TREE", "") == pool.processes[0].mark for environment in environments)
        sync = CollectiveWeightSync(pool.endpoints, **api, **admin)
        sync.publish(2, reference.checkpoint_tensors(new_model, tmp_path / "new"))
        client = GenerationClient(pool.endpoints, **api, **client_options)
        generations = [generation for row in client.generate(REQUESTS, sampling(), num_samples=2) for generation in row]
        assert {generation.policy_versions for generation in generations} == {(2, 2)}
        assert reference.largest_difference(new_model, generations) < 1e-4
        expected = expected_checksums(reference.checkpoint_tensors(new_model, tmp_path / "again"), dtype=torch.float32)
        check_equal(expected, endpoint, **api, **admin)

        with pytest.raises(RolloutFailed, match=r"^http://127\S*: request prompt0#0 and 4 more: HTTP 401: .*$"):
            GenerationClient(pool.endpoints, api_key="wrong", **client_options).generate(REQUESTS, sampling(), num_samples=1)
        for wrong in ({}, api, {"api_key": "wrong"}, {**api, "admin_key": "wrong"}):
            with pytest.raises(ServerRefused, match=r"^http://127\S*/weights_checker: HTTP 401: .*$"):
                check_equal(expected, endpoint, **wrong)
        with pytest.raises(WeightSyncFailed, match=r"^policy version 3: cannot join \S* weight sync group: .*HTTP 401: .*$"):
            CollectiveWeightSync(pool.endpoints, **api).publish(3, iter(()))
        with pytest.raises(ServerRefused, match=r"^http://127\S*/model_info: HTTP 401: .*$"):
            weight_version(endpoint, key=settings.admin_key, timeout_s=10)
        sync.close()
    log = (tmp_path / "logs/server_0.log").read_text()
    assert "server_args" in log and "key-of-the-test" not in log

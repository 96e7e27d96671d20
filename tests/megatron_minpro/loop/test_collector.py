"""From prompts to a batch: what is asked of the servers, what is judged, which advantage goes to which response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints_convert.hf_config import Architecture
from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.batch.routing_file import RoutingAppender
from megatron_minpro.batch.top_tokens_file import TopTokensAppender
from megatron_minpro.config import DynamicSamplingConfig
from megatron_minpro.data.prompts import PromptCursor, PromptList
from megatron_minpro.environments.environment import make_environment
from megatron_minpro.loop.collector import Collected, Collector, choose_groups
from megatron_minpro.loop.responder import Responder
from megatron_minpro.objectives.advantages import make_advantages
from megatron_minpro.rewards.reward import RewardOnArrival, RewardResult
from parallel.expert_rows import is_missing
from rollout.client import RolloutFailed, WeightsMissing
from rollout.records import NO_SINKS, Generation, GenerationRequest, SamplingParams, Sinks, VersionSpan
from tests.megatron_minpro.conftest import content, sample_content

GROUP = 3


class Tokenizer:
    """A token's text is its number; 98 is special."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(str(token_id) for token_id in token_ids if token_id != 98)


class Client:
    """Response j of a request is its first prompt token, then j, then the end; sampled under `version`."""

    samples_per_call = None
    is_rolling = False
    run = staticmethod(asyncio.run)

    def __init__(self, version: int | tuple[int, int] = 4) -> None:
        self.versions = (version, version) if isinstance(version, int) else version
        self.asked: list[tuple[list[GenerationRequest], SamplingParams]] = []
        self.fails_at: dict[int, Exception] = {}  # by the number of the call

    def metrics(self) -> dict[str, float]:
        asked = len(self.asked)
        counts = {"servers/used": 8.0 - asked, "servers/retries": float(asked), "servers/silent": float(asked)}
        return {**counts, "time/tail": asked / 4, "time/queued": asked / 8}

    def begin(self, request_ids: Iterable[str]) -> None: ...
    def end(self, request_id: str) -> None: ...

    @asynccontextmanager
    async def session(self, sampling: SamplingParams, *, policy_version: int, sinks: Sinks = NO_SINKS) -> AsyncIterator[Client]:
        assert policy_version == 4
        self.sampling, self.settings, self.sinks = sampling, self, sinks
        yield self

    async def generate(self, requests: Sequence[GenerationRequest], *, on_generation: None) -> list[Generation]:
        self.asked.append((list(requests), self.sampling))
        if (failure := self.fails_at.pop(len(self.asked), None)) is not None:
            raise failure
        first, last = self.versions
        routes, top = self.sinks.routes, self.sinks.top
        return [
            Generation(
                request_id=request.request_id,
                prompt_token_ids=request.prompt_token_ids,
                response_token_ids=(request.prompt_token_ids[0], request.sample_index, 99),
                engine_logprobs=(-0.1, -0.2, -0.3),
                version_spans=(VersionSpan(policy_version=first, start=0, end=1), VersionSpan(policy_version=last, start=1, end=3)),
                finish_reason="stop" if request.sample_index else "length",
                latency_s=0.0,
                num_retries=0,
                routes=None if routes is None or request.sample_index == 1 else routes.keep(experts_of(request), num_inputs=4),
                top=None if top is None else top.keep(*top_tokens_of(request)),
            )
            for request in requests
        ]


def top_tokens_of(request: GenerationRequest) -> tuple[np.ndarray, np.ndarray]:
    """Of 3 tokens: the first id tells the prompt, the second one the sample; likelier the later the sample."""
    ids = np.array([[request.prompt_token_ids[0], request.sample_index]] * 3, dtype=np.int32)
    return ids, np.log(np.array([[0.5, 0.1 * (request.sample_index + 1)]] * 3, dtype=np.float32))


def experts_of(request: GenerationRequest) -> bytes:
    """Of 4 tokens in 2 layers: the first expert tells the prompt, the second one the sample."""
    return np.array([request.prompt_token_ids[0] - 10, 10 + request.sample_index] * 8, dtype=np.int32).tobytes()


class SecondWord:
    """Rewards the second word: 0, 1, 2 for the responses of a group; the first prompt's responses are all worth 5."""

    name = "second_word"

    def __init__(self) -> None:
        self.error_counts: dict[str, int] = {}
        self.texts: list[str] = []
        self.finish_reasons: list[str] = []
        self.num_response_tokens: list[int] = []

    def score(self, conversations: Sequence[Conversation]) -> list[RewardResult]:
        self.texts += [conversation.response for conversation in conversations]
        self.finish_reasons += [conversation.finish_reason for conversation in conversations]
        self.num_response_tokens += [conversation.num_response_tokens for conversation in conversations]
        results = []
        for conversation in conversations:
            words = conversation.response.split()
            assert words[0] == conversation.prompt.answer, "a response is judged by its own prompt"
            reward = 5.0 if conversation.prompt.prompt_id == "p0" else float(words[1])
            results.append(RewardResult(reward=reward, correct=reward == 2, extracted=words[1], error=None))
        return results

    def close(self) -> None: ...


def make_collector(client: Client, reward: SecondWord, *, environment: str = "single_turn", **changed: Any) -> Collector:
    prompts = tuple(Prompt(prompt_id=f"p{i}", text=f"q{i}", token_ids=(10 + i, 7), answer=str(10 + i), source="test") for i in range(2))
    options = {
        "cursor": PromptCursor(PromptList(name="test", prompts=prompts), seed=0),
        "responder": Responder(
            client=client,  # type: ignore[arg-type]
            tokenizer=Tokenizer(),
            end_ids=(97, 99),
            environment=make_environment(environment),
            reward=reward,
        ),
        "advantages": make_advantages("mean_only"),
        "prompts_per_step": 2,
        "group_size": GROUP,
        "max_new_tokens": 8,
        "temperature": 0.7,
        "seed": 3,
    }
    return Collector(**{**options, **changed})


def test_a_batch_holds_every_response_with_the_advantage_of_its_own_group() -> None:
    client, reward = Client(), SecondWord()
    sampled = make_collector(client, reward).collect(6, policy_version=4)
    batch = sampled.batch
    assert (batch.sampled_at_step, batch.policy_version, batch.group_size, batch.num_groups) == (6, 4, GROUP, 2)
    assert [sample.sample_id for sample in batch.samples] == [f"step6-{n}" for n in range(6)]
    by_prompt = {int(batch.samples[start].token_ids[0]): batch.samples[start : start + GROUP] for start in (0, GROUP)}
    assert by_prompt.keys() == {10, 11}
    for first_token, samples in by_prompt.items():
        assert [sample.token_ids.tolist() for sample in samples] == [[first_token, 7, first_token, j, 99] for j in range(GROUP)]
    assert [sample.advantage for sample in by_prompt[10]] == [0.0, 0.0, 0.0]  # equal rewards teach nothing
    assert [sample.reward for sample in by_prompt[11]] == [0.0, 1.0, 2.0]
    assert [sample.advantage for sample in by_prompt[11]] == [-1.0, 0.0, 1.0]
    assert [sample.correct for sample in by_prompt[11]] == [False, False, True]
    for sample in batch.samples:
        assert (sample.loss_mask.tolist(), sample.behaviour_logprobs) == ([False, False, True, True, True], None)
        assert sample.engine_logprobs.tolist() == torch.tensor([-0.1, -0.2, -0.3]).tolist()
        assert sample.policy_versions == (4, 4)
    assert [sample.finish_reason for sample in batch.samples] == ["length", "stop", "stop"] * 2


def test_what_people_read_is_in_the_order_of_the_samples() -> None:
    sampled = make_collector(Client(), SecondWord()).collect(0, policy_version=4)
    for (conversation, result), sample in zip(sampled.judged, sampled.batch.samples, strict=True):
        assert conversation.text.startswith(f"{sample.token_ids[0]} {sample.token_ids[3]}")
        assert (result.reward, conversation.prompt.token_ids) == (sample.reward, tuple(sample.token_ids[:2].tolist()))


def test_servers_are_asked_for_the_whole_policy_with_the_steps_seed() -> None:
    client = Client()
    collector = make_collector(client, SecondWord())
    collector.collect(0, policy_version=4)
    collector.collect(1, policy_version=4)
    [(requests, sampling), (later_requests, later_sampling)] = client.asked
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (8, 0.7, 1.0, -1)
    assert (sampling.stop_token_ids, len(requests)) == ((97, 99), 2 * GROUP)
    assert sampling.seed != later_sampling.seed
    assert {request.name for request in requests}.isdisjoint(request.name for request in later_requests)
    again = Client()
    make_collector(again, SecondWord()).collect(0, policy_version=4)
    assert again.asked[0] == client.asked[0], "the same seed asks the same again"


def test_the_token_that_ended_a_response_is_trained_but_not_graded() -> None:
    reward = SecondWord()
    sampled = make_collector(Client(), reward).collect(0, policy_version=4)
    assert all(sample.token_ids[-1] == 99 for sample in sampled.batch.samples)
    assert [text.split()[2:] for text in reward.texts] == [[]] * 6


def test_the_reward_learns_lengths_and_reasons() -> None:
    reward = SecondWord()
    make_collector(Client(), reward).collect(0, policy_version=4)
    assert reward.num_response_tokens == [3] * 6
    assert reward.finish_reasons == ["length", "stop", "stop"] * 2


@pytest.mark.parametrize("versions", [(3, 3), (4, 5), (3, 4)])
def test_a_response_of_other_weights_is_refused(versions: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=rf"^step0-0: sampled under policy versions \({versions[0]}, {versions[1]}\), expected 4 throughout$"
    ):
        make_collector(Client(versions), SecondWord()).collect(0, policy_version=4)


def test_prompts_go_on_where_the_last_batch_ended() -> None:
    collector = make_collector(Client(), SecondWord(), prompts_per_step=1, advantages=lambda rewards: torch.zeros_like(rewards))
    seen = [int(collector.collect(step, policy_version=4).batch.samples[0].token_ids[0]) for step in range(4)]
    assert sorted(seen[:2]) == sorted(seen[2:]) == [10, 11]


def test_prompts_drawn_ahead_are_those_of_their_step_whoever_is_first() -> None:
    def collector() -> Collector:
        return make_collector(Client(), SecondWord(), prompts_per_step=1, advantages=lambda rewards: torch.zeros_like(rewards))

    one_by_one, ahead = collector(), collector()
    expected = [one_by_one.collect(step, policy_version=4).batch for step in range(2)]
    for step in range(2):
        ahead.draw(step)
    later, earlier = (ahead.collect(step, policy_version=4).batch for step in (1, 0))
    assert [[sample.token_ids.tolist() for sample in batch.samples] for batch in (earlier, later)] == [
        [sample.token_ids.tolist() for sample in batch.samples] for batch in expected
    ]


def test_prompts_drawn_ahead_are_asked_again_after_a_failure() -> None:
    client, cursor = Client(), InOrder()
    client.fails_at = {1: WeightsMissing("all servers were restarted")}
    rewards = {f"p{i}": MIXED for i in range(6)}
    collector = make_collector(client, Scripted(rewards), cursor=cursor, prompts_per_step=2)
    for step in range(2):
        collector.draw(step)
    with pytest.raises(WeightsMissing):
        collector.collect(0, policy_version=4)
    collector.draw(2)
    for step in (2, 0, 1):
        collector.collect(step, policy_version=4)
    assert client.asked[0] == client.asked[2]
    first_tokens = [[request.prompt_token_ids[0] for request in requests[::GROUP]] for requests, _ in client.asked[1:]]
    assert first_tokens == [[14, 15], [10, 11], [12, 13]] and cursor.position == 6


@pytest.mark.parametrize("failure", [WeightsMissing("all servers were restarted"), RolloutFailed("gave up")])
def test_a_failed_call_asks_for_the_same_again_and_loses_no_prompt(failure: Exception) -> None:
    rewards = {f"p{i}": row for i, row in enumerate([EQUAL, MIXED, EQUAL, EQUAL, MIXED, MIXED])}
    client, cursor = Client(), InOrder()
    client.fails_at = {2: failure}
    collector = make_collector(
        client,
        Scripted(rewards),
        cursor=cursor,
        prompts_per_step=3,
        dynamic_sampling=DynamicSamplingConfig(equal="reward", max_rounds=3),
    )
    with pytest.raises(type(failure)):
        collector.collect(7, policy_version=4)
    assert cursor.position == 0
    sampled = collector.collect(7, policy_version=4)
    undisturbed, _, end = dynamically([EQUAL, MIXED, EQUAL, EQUAL, MIXED, MIXED])
    assert sampled.judged == undisturbed.judged and cursor.position == end.position
    assert client.asked[:2] == client.asked[2:4]
    counts = {"servers/used": 5.0, "servers/retries": 3.0 + 4 + 5, "servers/silent": 5.0}
    assert sampled.servers == {**counts, "time/tail": 5 / 4, "time/queued": 3 / 8}


def test_what_servers_return_lies_in_files_whatever_broke_off(tmp_path: Path) -> None:
    """Experts and most likely tokens. Response 1 of every group is one whose experts are not known."""
    client = Client()
    client.fails_at = {2: WeightsMissing("all servers were restarted")}
    new_file = partial(RoutingAppender, tmp_path, model_with_experts())
    rewards = {f"p{i}": row for i, row in enumerate([EQUAL, *[MIXED] * 4])}
    sampling = DynamicSamplingConfig(equal="reward", max_rounds=2)
    options: dict[str, Any] = {"cursor": InOrder(), "prompts_per_step": 2, "dynamic_sampling": sampling}
    options |= {"top_tokens": lambda step: TopTokensAppender(tmp_path, top_k=2, vocab_size=100, step=step)}
    collector = make_collector(client, Scripted(rewards), routing=lambda step: new_file(step=step), **options)
    with pytest.raises(WeightsMissing):
        collector.collect(7, policy_version=4)
    collected = collector.collect(7, policy_version=4)
    batch = collected.batch
    assert batch.routing is not None and batch.routing.name == "step_000007.rows" and batch.top_tokens is not None
    rows = batch.routing.rows(tmp_path, [4] * len(batch.samples))
    found = [None if is_missing(each).all() else each[:, :, 0].unique().tolist() + each[:, :, 1].unique().tolist() for each in rows]
    first = [int(sample.token_ids[0]) for sample in batch.samples]
    assert first == [11] * 3 + [12] * 3
    assert found == [[1, 10], None, [1, 12], [2, 10], None, [2, 12]]
    assert [top.ids.tolist() for top in batch.top_tokens.rows(tmp_path, [3] * 6)] == [[[p, s]] * 3 for p in (11, 12) for s in (0, 1, 2)]
    # This client gives the first round's two groups again. The responses of each of five groups have 0.6, 0.7 and 0.8 together.
    assert collected.servers["centering/top_mass"] == pytest.approx(0.7) and batch.top_tokens.num_bytes == 5 * 3 * 3 * 2 * 8
    assert collected.servers["centering/top_mass_min"] == pytest.approx(0.6)
    collector.collect(8, policy_version=4)
    assert sorted(path.name for path in tmp_path.glob("*.rows")) == ["step_000007.rows", "step_000008.rows"]
    assert batch.files == ["routing/step_000007.rows", "top_tokens/step_000007.top"]


def model_with_experts() -> Architecture:
    shape = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "num_key_value_heads": 2}
    moe = {"intermediate_size": 16, "moe_intermediate_size": 8, "num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True}
    other = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False, "max_position_embeddings": 64}
    return Architecture.from_config({"model_type": "qwen3_moe", **shape, **moe, **other}, source="test")


class LastFirst(SecondWord):
    """The same verdicts, each conversation judged for itself, and the later ones sooner."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way = 0

    async def judge(self, conversation: Conversation) -> RewardResult:
        self.under_way += 1
        await asyncio.sleep(0)  # all have begun
        await asyncio.sleep(0.01 / self.under_way)
        [result] = self.score([conversation])
        self.under_way -= 1
        return result


def test_judging_on_arrival_gives_the_batch_of_judging_at_the_end() -> None:
    at_the_end, on_arrival = SecondWord(), LastFirst()
    assert not isinstance(at_the_end, RewardOnArrival) and isinstance(on_arrival, RewardOnArrival)
    expected = make_collector(Client(), at_the_end).collect(3, policy_version=4)
    found = make_collector(Client(), on_arrival).collect(3, policy_version=4)
    assert content([found.batch]) == content([expected.batch])
    assert found.judged == expected.judged and found.cursor == expected.cursor
    assert len(on_arrival.texts) == len(at_the_end.texts) == 2 * GROUP


# ------------------------------------------------------------------------------------------------------------ dynamic sampling


class Scripted(SecondWord):
    """Rewards that a table of prompt ids names, one per response of a group; the answer is right where the reward is above 0.5."""

    def __init__(self, rewards: dict[str, Sequence[float]]) -> None:
        super().__init__()
        self.rewards = rewards

    def score(self, conversations: Sequence[Conversation]) -> list[RewardResult]:
        rewards = [self.rewards[said.prompt.prompt_id][int(said.response.split()[1])] for said in conversations]
        return [RewardResult(reward=x, correct=x > 0.5, extracted=None, error=None) for x in rewards]


class InOrder:
    """Prompts p0, p1, p2, ... one after the other."""

    def __init__(self) -> None:
        self.position = 0

    def next(self, num_prompts: int) -> list[Prompt]:
        numbers = range(self.position, self.position + num_prompts)
        self.position += num_prompts
        return [Prompt(prompt_id=f"p{i}", text=f"q{i}", token_ids=(10 + i, 7), answer=str(10 + i), source="test") for i in numbers]

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


EQUAL, MIXED, SHAPED = (1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (0.0, -0.5, 0.25)  # SHAPED: all wrong, told apart by their lengths


def dynamically(rewards: list[Sequence[float]], *, equal: str = "reward", max_rounds: int = 3) -> tuple[Collected, Client, InOrder]:
    client, cursor = Client(), InOrder()
    collector = make_collector(
        client,
        Scripted({f"p{i}": row for i, row in enumerate(rewards)}),
        cursor=cursor,
        prompts_per_step=3,
        dynamic_sampling=DynamicSamplingConfig(equal=equal, max_rounds=max_rounds),
    )
    return collector.collect(7, policy_version=4), client, cursor


def prompts_of(samples: Sequence[Any]) -> list[int]:
    return [int(sample.token_ids[0]) - 10 for sample in samples[::GROUP]]


def test_equal_groups_are_replaced_until_the_batch_is_full() -> None:
    sampled, client, cursor = dynamically([EQUAL, MIXED, EQUAL, EQUAL, MIXED, MIXED])
    assert [[request.prompt_token_ids[0] - 10 for request in requests[::GROUP]] for requests, _ in client.asked] == [[0, 1, 2], [3, 4], [5]]
    assert prompts_of(sampled.batch.samples) == [1, 4, 5] and prompts_of(sampled.dropped) == [0, 2, 3]
    assert (sampled.rounds, sampled.equal_groups, cursor.position) == (3, 0, 6)
    assert [sample.reward for sample in sampled.batch.samples] == list(MIXED) * 3
    assert [sample.advantage for sample in sampled.batch.samples] == pytest.approx([-1 / 3, 2 / 3, -1 / 3] * 3)
    assert [sample.advantage for sample in sampled.dropped] == [0.0] * 9


def test_every_response_is_kept_or_dropped_and_has_its_name_and_seed() -> None:
    sampled, client, _ = dynamically([EQUAL, MIXED, EQUAL, EQUAL, MIXED, MIXED])
    everything = [*sampled.batch.samples, *sampled.dropped]
    assert sorted(int(sample.sample_id.removeprefix("step7-")) for sample in everything) == list(range(18))
    names = [request.name for requests, _ in client.asked for request in requests]
    assert len(set(names)) == 18, "a response's seed depends on its request's name"
    for (conversation, _), sample in zip(sampled.judged, everything, strict=True):
        assert conversation.prompt.token_ids == tuple(sample.token_ids[:2].tolist())


def test_when_the_rounds_run_out_the_earliest_equal_groups_fill_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    sampled, client, _ = dynamically([EQUAL, EQUAL, EQUAL, EQUAL, MIXED, EQUAL], max_rounds=2)
    assert len(client.asked) == 2
    assert prompts_of(sampled.batch.samples) == [0, 1, 4] and prompts_of(sampled.dropped) == [2, 3, 5]
    assert (sampled.rounds, sampled.equal_groups) == (2, 2)
    assert "step 7: 2 equal groups stay in the batch after 2 rounds of sampling" in caplog.text
    assert [sample.advantage for sample in sampled.batch.samples[: 2 * GROUP]] == [0.0] * 6


def test_rewards_that_length_shaping_told_apart_are_equal_by_correctness() -> None:
    rewards = [SHAPED, MIXED, MIXED, MIXED]
    assert prompts_of(dynamically(rewards, equal="reward")[0].batch.samples) == [0, 1, 2]
    assert prompts_of(dynamically(rewards, equal="correct")[0].batch.samples) == [1, 2, 3]


def test_a_full_first_round_is_the_batch_of_a_collector_without_the_option() -> None:
    rewards = Scripted(dict.fromkeys(("p0", "p1"), MIXED))
    plain_client, client = Client(), Client()
    plain = make_collector(plain_client, rewards).collect(0, policy_version=4)
    option = DynamicSamplingConfig(equal="reward", max_rounds=2)
    dynamic = make_collector(client, rewards, dynamic_sampling=option).collect(0, policy_version=4)
    assert (content([dynamic.batch]), dynamic.dropped, client.asked) == (content([plain.batch]), (), plain_client.asked)


def test_the_same_seed_repeats_batches_and_a_cursor_gives_the_next() -> None:
    numbers = range(40)
    prompts = tuple(Prompt(prompt_id=f"p{i}", text=f"q{i}", token_ids=(10 + i, 7), answer=str(10 + i), source="test") for i in numbers)
    rewards = Scripted({f"p{i}": EQUAL if i % 3 else MIXED for i in numbers})

    def collector() -> Collector:
        return make_collector(
            Client(),
            rewards,
            cursor=PromptCursor(PromptList(name="test", prompts=prompts), seed=5),
            prompts_per_step=4,
            dynamic_sampling=DynamicSamplingConfig(equal="reward", max_rounds=3),
        )

    whole, resumed = collector(), collector()
    batches = [whole.collect(step, policy_version=4) for step in range(2)]
    assert batches[0].rounds == 3, "the seed is one that needs further rounds"
    state = whole.cursor.state()
    batches += [whole.collect(step, policy_version=4) for step in range(2, 4)]
    resumed.cursor.load_state(state)
    continued = [resumed.collect(step, policy_version=4).batch for step in range(2, 4)]
    assert content(continued) == content([sampled.batch for sampled in batches[2:]])
    again = collector()
    repeated = [again.collect(step, policy_version=4) for step in range(4)]
    assert content([sampled.batch for sampled in repeated]) == content([sampled.batch for sampled in batches])
    assert [sample_content(sampled.dropped) for sampled in repeated] == [sample_content(sampled.dropped) for sampled in batches]


@pytest.mark.parametrize(
    ("useful", "wanted", "chosen"),
    [
        ([True, False, True], 2, [0, 2]),
        ([True, True, True], 2, [0, 1]),
        ([False, True, False, False], 3, [0, 1, 2]),
        ([False, False], 2, [0, 1]),
    ],
)
def test_choice_of_groups_by_hand(useful: list[bool], wanted: int, chosen: list[int]) -> None:
    assert choose_groups(useful, wanted) == chosen

"""Run by rank_pool.py for the tests of the actor: on one layout after the other, actors score and train a fixture's sequences.

Arguments: FIXTURE_DIR OUT_DIR, with OUT_DIR/requests.json: [{name, port, layout, runs: {name: run}}].

Each run starts with a fresh actor and leaves OUT_DIR/<name>/<run>/results.safetensors and reports.json. Keys of a run: optimizer,
learning_rate, steps, and, where wanted, dtype, recompute, max_tokens, megatron (options), load (a checkpoint of these actors to start
from, with first_step steps behind it), save_to (an absent folder for one, at the end, that names wrong settings of the optimizer),
reload_before_step (save while another step is taken, build a new actor, load), swap_weights (score under the first weights before every
later step), count_micro_batches (see `micro_batches_alive`), attention (another product than this machine's), poison (between scoring
and training, see `poisoned`), refuse (see `refusals`), check_model (see `checked`), tamper (see `tampered`), replay (the sequences and
rows of experts of FIXTURE_DIR/replayed), record (score once more, record the experts, train with them), misroute (see `misrouted`).
"""

import dataclasses
import json
import math
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from checkpoints_convert.dtypes import DTYPES
from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.safetensors_io import SafetensorsReader
from megatron_minpro.loop.update import make_loss_function
from megatron_minpro.objectives import make_objective
from parallel import actor as actor_module
from parallel import process_groups
from parallel.actor import ActorSettings, MegatronActor
from parallel.capabilities import detect
from parallel.layout import ParallelLayout
from parallel.mcore import TopKRouter, parallel_state, version
from parallel.model_check import check_model
from parallel.optimizer import inner_optimizers
from parallel.optimizer_settings import OptimizerSettings
from parallel.packing import break_even_tokens, plan_replicas
from parallel.token_sequence import TokenSequence

LOSS = make_loss_function(make_objective("minpro"))


def build(fixture: Path, layout: ParallelLayout, groups: process_groups.ProcessGroups, run: dict) -> MegatronActor:
    settings = ActorSettings(
        dtype=DTYPES[run.get("dtype", "float32")],
        recompute=run.get("recompute", "none"),
        max_tokens_per_micro_batch=run.get("max_tokens", 48),
        logprob_chunk_tokens=16,
        temperature=run.get("temperature", 1.0),
        optimizer=OptimizerSettings(**run["optimizer"]),
        megatron_options=run.get("megatron", {}),
    )
    actor = MegatronActor(read_architecture(fixture), layout, groups, detect(), settings)
    if "attention" in run:
        for module in actor._modules:
            for layer in module.decoder.layers:
                layer.self_attention.core_attention.product = run["attention"]
    with SafetensorsReader(fixture) as reader:
        actor.load_hugging_face(reader.read)
    return actor


def read_sequences(fixture: Path) -> list[TokenSequence]:
    tensors = load_file(fixture / "sequences.safetensors")
    rows = fixture / "experts.safetensors"
    experts = load_file(rows) if rows.exists() else {}
    count = sum(name.startswith("token_ids.") for name in tensors)
    return [
        TokenSequence(
            token_ids=tensors[f"token_ids.{i}"],
            loss_mask=tensors[f"loss_mask.{i}"],
            streams={name: tensors[f"{name}.{i}"] for name in ("behaviour_logprobs", "advantages")},
            experts=experts.get(f"experts.{i}"),
        )
        for i in range(count)
    ]


class Recorder:
    """Keeps what this rank's routers chose, and puts the parts of all ranks together."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, int, int, torch.Tensor]] = []

    def write(self, index: int, layer: int, position: int, rows: torch.Tensor) -> None:
        self.parts.append((index, layer, position, rows.clone()))

    def assemble(self, sequences: list[TokenSequence], actor: MegatronActor) -> list[torch.Tensor]:
        """[layers, L - 1, k] per sequence. Every row must have been written once."""
        everybody: list[list] = [[]] * dist.get_world_size()
        dist.all_gather_object(everybody, self.parts)
        a = actor.architecture
        whole = [torch.full((a.num_hidden_layers, s.num_positions, a.num_experts_per_tok), 255, dtype=torch.uint8) for s in sequences]
        for index, layer, position, rows in (part for parts in everybody for part in parts):
            target = whole[index][layer, position : position + len(rows)]
            assert (target == 255).all(), "two ranks recorded one row"
            target.copy_(rows)
        assert not any((rows == 255).any() for rows in whole), "a row was recorded by no rank"
        return whole


def refusal(action: Callable[[], object]) -> str:
    """What the error says."""
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


def misrouted(actor: MegatronActor, sequences: list[TokenSequence]) -> dict:
    """What every rank is told about rows that no router could have chosen, and which weights moved."""
    good = sequences[0].experts
    assert good is not None

    def with_row(row: list[int]) -> torch.Tensor:
        experts = good.clone()
        experts[-1, -1] = torch.tensor(row, dtype=experts.dtype)
        return experts

    wrong = [torch.zeros_like(good), with_row([1, 1]), with_row([0, 4]), with_row([255, 1]), good[:-1], good[..., :1], good.short()]
    said, before = [], exported(actor)
    for experts in wrong:
        batch = [dataclasses.replace(sequences[0], experts=experts), *sequences[1:]]
        for action in (actor.logprobs, partial(actor.update, loss_fn=LOSS, learning_rate=1.0)):
            said.append(refusal(partial(action, batch)))
    said.append(refusal(partial(actor.logprobs, sequences, record=Recorder())))
    if dist.get_rank() == 0:
        router = next(module for module in actor._modules[0].modules() if isinstance(module, TopKRouter))
        asking, router.router_replay = router.router_replay, None
    said.append(refusal(partial(actor.logprobs, sequences)))
    if dist.get_rank() == 0:
        router.router_replay = asking
    after = exported(actor)
    everybody: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everybody, said)
    return {"said": everybody, "weights_moved": [name for name in before if not torch.equal(before[name], after[name])]}


def exported(actor: MegatronActor) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in actor.export_weights()}


def save_actor(actor: MegatronActor, path: Path, *, first: bool) -> None:
    if first:
        path.mkdir(parents=True)
    dist.barrier()
    actor.save(path)


def save_while_training(
    actor: MegatronActor, groups: process_groups.ProcessGroups, sequences: list[TokenSequence], run: dict, path: Path
) -> None:
    """A thread writes what was captured, while the actor takes another step."""
    kept = path.with_name("kept")
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
        kept.mkdir()
    dist.barrier()
    writers = [actor.capture(path)]
    if run.get("swap_weights"):
        writers.append(actor.capture_kept(kept))
    with ThreadPoolExecutor(1) as thread:
        written = [thread.submit(each.write, groups.saving) for each in writers]
        actor.update(sequences, LOSS, learning_rate=run["learning_rate"])
        for each in written:
            each.result()


def micro_batches_alive(actor: MegatronActor, sequences: list[TokenSequence]) -> list[int]:
    """Of one forward and backward pass: how many micro-batches are in memory at each call of the loss, and after the last."""
    made: list[weakref.ref] = []
    counts: list[int] = []
    build = actor._micro_batches

    def watched(*arguments: Any) -> list:
        micro_batches = build(*arguments)
        made.extend(weakref.ref(micro_batch.packed_seq_params) for micro_batch in micro_batches)
        return micro_batches

    def counting(**tokens: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        counts.append(sum(one() is not None for one in made))
        return LOSS(**tokens)

    with mock.patch.object(actor, "_micro_batches", watched):
        actor.update(sequences, counting, learning_rate=0.0)
    return [*counts, sum(one() is not None for one in made)]


def poisoned(actor: MegatronActor, sequences: list[TokenSequence], run: dict) -> dict:
    """On one rank the log-probs of every eighth token id become NaN. What every rank is told then, and which weights moved."""
    score = actor_module.token_logprobs

    def poisoned_score(hidden: torch.Tensor, weight: torch.Tensor, labels_T: torch.Tensor, **options: object) -> tuple:
        logprobs_T, entropy_T = score(hidden, weight, labels_T, **options)
        hit_T = (labels_T % 8 == run["poison"]["residue"]) & (dist.get_rank() == run["poison"]["rank"])
        return torch.where(hit_T, torch.nan, logprobs_T), entropy_T

    said: list[str] = []
    before = exported(actor)
    with mock.patch.object(actor_module, "token_logprobs", poisoned_score):
        for action in (
            lambda: actor.logprobs(sequences),
            lambda: actor.sum_statistics(sequences, lambda *, logprobs_T, **unused: logprobs_T.detach().double().sum()[None]),
            lambda: actor.update(sequences, LOSS, learning_rate=run["learning_rate"]),
        ):
            try:
                action()
                said.append("nothing")
            except FloatingPointError as error:
                said.append(str(error))
    after = exported(actor)
    everybody: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everybody, said)
    return {"said": everybody, "weights_moved": [name for name in before if not torch.equal(before[name], after[name])]}


def refusals(actor: MegatronActor, sequences: list[TokenSequence]) -> list[str]:
    """What rank 0 alone is told about bad mini-batches. The others do not call: nothing may wait for them."""
    if dist.get_rank() != 0:
        return []
    good = sequences[0]
    nan_at_trained = torch.where(good.loss_mask, torch.nan, 0.0)
    changes = {
        "token_ids": [{"token_ids": good.token_ids + 96}, {"token_ids": good.token_ids - 96}],
        "streams": [
            {"streams": {"advantages": good.streams["advantages"]}},
            {"streams": {**good.streams, "behaviour_logprobs": nan_at_trained}},
            {"streams": {**good.streams, "advantages": good.streams["advantages"] * torch.inf}},
        ],
    }
    long = TokenSequence(
        token_ids=torch.zeros(500, dtype=torch.int64),
        loss_mask=torch.ones(499, dtype=torch.bool),
        streams={name: torch.zeros(499) for name in good.streams},
    )
    untrained = [dataclasses.replace(sequence, loss_mask=torch.zeros_like(sequence.loss_mask)) for sequence in sequences]
    batches = [[], untrained, [good, long]]
    batches += [[good, dataclasses.replace(good, **change)] for kind in changes.values() for change in kind]
    said = []
    for batch in batches:
        try:
            actor.update(batch, LOSS, learning_rate=1.0)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def checked(actor: MegatronActor, groups: process_groups.ProcessGroups, sequences: list[TokenSequence]) -> dict:
    """What `check_model` says of the actor: the same on every rank."""
    try:
        token_ids = [sequence.token_ids.tolist() for sequence in sequences]
        said = dataclasses.asdict(check_model(actor, token_ids, control_group=groups.control))
    except ValueError as error:
        said = {"refused": str(error)}
    everybody: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(everybody, said)
    assert all(other == said for other in everybody)
    return said


def tampered(actor: MegatronActor, groups: process_groups.ProcessGroups, sequences: list[TokenSequence], run: dict) -> list[dict]:
    """What the check says while one of Megatron's options has another value in the built model, for each value of run["tamper"]."""
    modules = [module for chunk in actor._modules for module in chunk.modules()]
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}.values()
    said = []
    for change in run["tamper"]:
        before = {name: getattr(actor._config, name) for name in change}
        for values in (change, before):
            for config in configs:
                vars(config).update(values)
            for router in modules:
                if isinstance(router, TopKRouter):
                    router.topk = router.config.moe_router_topk  # read once, when it is built
            if values is change:
                said.append(checked(actor, groups, sequences))
    return said


def train(fixture: Path, out: Path, layout: ParallelLayout, groups: process_groups.ProcessGroups, run: dict) -> None:
    first = groups.coordinates.rank == 0
    actor = build(fixture, layout, groups, run)
    first_step = run.get("first_step", 0)
    if "load" in run:
        actor.load(Path(run["load"]), policy_version=first_step)
    sequences = read_sequences(fixture / "replayed" if run.get("replay") else fixture)
    results = {f"before.{name}": tensor for name, tensor in exported(actor).items()}
    entropies: list[torch.Tensor] = []
    results |= {f"logprobs.{i}": x.clone() for i, x in enumerate(actor.logprobs(sequences, entropies=entropies))}
    entropy = sum(float(x[sequence.loss_mask].double().sum()) for x, sequence in zip(entropies, sequences, strict=True))
    plans = plan_replicas(
        [sequence.num_positions for sequence in sequences],
        layout,
        max_tokens=run.get("max_tokens", 48),
        break_even=break_even_tokens(actor.architecture),
    )
    notes: dict = {"megatron_core": version, "empty_micro_batches": sum(not group for plan in plans for group in plan)}
    if run.get("replay"):
        total = actor.sum_statistics(
            sequences, lambda *, logprobs_T, loss_mask_T, **unused: (logprobs_T.double() * loss_mask_T).sum()[None]
        )
        notes["statistics"] = total.tolist()
    if run.get("misroute"):
        notes["misroute"] = misrouted(actor, sequences)
    if run.get("record"):
        recorder = Recorder()
        actor.logprobs(sequences, record=recorder)
        recorded = recorder.assemble(sequences, actor)
        sequences = [dataclasses.replace(sequence, experts=experts) for sequence, experts in zip(sequences, recorded, strict=True)]
        results |= {f"recorded.{i}": experts for i, experts in enumerate(recorded)}
        results |= {f"logprobs.{i}": x.clone() for i, x in enumerate(actor.logprobs(sequences))}
    if run.get("check_model"):
        notes["model_check"] = checked(actor, groups, sequences)
    if "tamper" in run:
        notes["tampered"] = tampered(actor, groups, sequences, run)
    if "refuse" in run:
        notes["refusals"] = refusals(actor, sequences)
    if "poison" in run:
        notes["poison"] = poisoned(actor, sequences, run)
    reports = []
    for step in range(first_step, first_step + run["steps"]):
        if step == run.get("reload_before_step"):
            save_while_training(actor, groups, sequences, run, out / "actor")
            actor = build(fixture, layout, groups, run)
            actor.load(out / "actor", policy_version=step)
            if run.get("swap_weights"):
                actor.load_kept(out / "kept", policy_version=first_step)
        if run.get("swap_weights") and step == first_step:
            scored = actor.logprobs(sequences)
            actor.keep_weights()
        elif run.get("swap_weights"):
            with actor.kept_weights():
                again = actor.logprobs(sequences)
                notes.setdefault("kept_versions", []).append(actor.policy_version)
            notes.setdefault("kept", []).append(all(torch.equal(x, y) for x, y in zip(scored, again, strict=True)))
        # Exactly the rate where every rank has the sums of the whole mini-batch.
        trained, rate = sum(int(sequence.loss_mask.sum()) for sequence in sequences), run["learning_rate"]
        report = actor.update(sequences, LOSS, learning_rate=lambda sums, n=trained, rate=rate: rate * (float(sums["ratio/mean"][1]) / n))
        assert report.learning_rate == rate
        if step == first_step:
            assert math.isclose(float(report.metrics["policy/entropy"][0]), entropy, rel_tol=1e-5), "entropies lie at their tokens"
        if report.routing is not None:
            notes["routing"] = dataclasses.asdict(report.routing)
        reports.append(
            {
                "loss": report.loss,
                "grad_norm": report.grad_norm,
                "num_tokens": report.num_tokens,
                "policy_version": report.policy_version,
                "metrics": {name: value.tolist() for name, value in report.metrics.items()},
            }
        )
    results |= {f"after.{name}": tensor for name, tensor in exported(actor).items()}
    if run.get("count_micro_batches"):
        notes["micro_batches_alive"] = micro_batches_alive(actor, sequences)
    if "save_to" in run:
        for each in inner_optimizers(actor._optimizer):  # as by a run with other settings, under a torch without a fused step
            for group in each.optimizer.param_groups:
                group |= {"betas": (0.5, 0.5), "eps": 1.0, "fused": None}
        save_actor(actor, Path(run["save_to"]), first=first)
    if first:
        out.mkdir(exist_ok=True, parents=True)
        save_file({name: tensor.float().contiguous() for name, tensor in results.items()}, out / "results.safetensors")
        (out / "reports.json").write_text(json.dumps({"reports": reports, "notes": notes}))


def refuse_pairs(name: str) -> Callable[..., Any]:
    """torch.distributed's `send` or `recv`; fails over a group that would be NCCL on GPUs."""
    function = getattr(dist, name)

    def over_gloo(*arguments: Any, group: dist.ProcessGroup | None = None, **options: Any) -> Any:
        gloo = [found for name_of_group, found in vars(parallel_state).items() if name_of_group.endswith("_GLOO")]
        assert group in gloo, "NCCL makes a communicator of two ranks for a single send or receive"
        return function(*arguments, group=group, **options)

    return over_gloo


def main() -> None:
    fixture, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # each layout meets at a port of its own
    for request in json.loads((out / "requests.json").read_text()):
        os.environ["MASTER_PORT"] = str(request["port"])
        layout = ParallelLayout(**request["layout"])
        groups = process_groups.initialize(layout, backend="gloo", seed=0, timeout_s=90)
        # Not isend and irecv: batch_isend_irecv wants them as they are.
        with mock.patch.multiple(dist, **{name: refuse_pairs(name) for name in ("send", "recv")}):
            for name, run in request["runs"].items():
                train(fixture, out / request["name"] / name, layout, groups, run)
        process_groups.shut_down()


if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file again
    main()

"""What transformers and torch say about a small model in one process, actors on real gloo ranks, and the table that compares them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout.ports import free_ports
from tests.conftest import PARITY
from tests.rank_pool import RankPool

# Off policy, packed, masked in the middle, lengths that no parallel size divides.
LENGTHS = (19, 7, 2, 24, 13, 11, 30, 5)
# eps near the median gradient (7e-4): with 1e-8 a gradient that cancels to 3e-9 is rounding alone, yet moves its weight by half a rate.
ADAM: dict[str, Any] = {"weight_decay": 0.1, "betas": [0.9, 0.98], "eps": 1e-4, "gradient_clip": 0.5}
LEARNING_RATE, STEPS = 1e-3, 3
# name -> (Qwen3-MoE or dense Qwen3, tied embeddings, layers)
FAMILIES = {"moe": (True, False, 4), "moe_5_layers": (True, False, 5), "moe_6_layers": (True, False, 6), "dense_tied": (False, True, 4)}
BALANCE_COEFFICIENT = 0.3  # far more than anybody trains with, so that its gradient shows


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """Sequences of equal lengths, so that no mix-up shows by a shape, with random rows of experts; some rows are missing."""

    rows: list[torch.Tensor | None]  # uint8 [layers, L - 1, k]; 255 in a missing row, None: all are missing
    loss_masks: list[torch.Tensor]
    logprobs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    balanced_gradients: dict[str, torch.Tensor]
    differing: int  # rows that are not the choice of the router that meets them


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model and its sequences in a folder, and the reference for each: Hugging Face names, fp32."""

    name: str
    directory: Path
    sequences: list[dict[str, torch.Tensor]]
    logprobs: list[torch.Tensor]
    loss: float
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    balanced_gradients: dict[str, torch.Tensor] | None  # of MinPRO plus the experts' balance loss; None for a dense model
    norms: list[float]  # before clipping, of three steps
    stepped: dict[str, torch.Tensor]  # weights after them
    chosen: list[torch.Tensor]  # [layers, L - 1, k] ascending: the experts of the sequences; empty for a dense model
    replayed: Replayed | None  # None for a dense model


def _make_model(directory: Path, *, moe: bool, tied: bool, layers: int) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": tied,
        "use_cache": False,
    }
    if moe:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **shape, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1
            )
        )
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if "gate.weight" in name else 0.15))
    model.save_pretrained(directory)
    return model.float().train()


def _make_sequences(model: torch.nn.Module, directory: Path, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    sequences = []
    for length in lengths:
        token_ids = torch.randint(0, 96, (length,), generator=generator)
        mask = torch.rand(length - 1, generator=generator) < 0.7
        mask[: length // 4] = False
        mask[-1] = True
        logprobs = _logprobs(model, token_ids).detach()
        drift = 0.6 * torch.randn(length - 1, generator=generator)
        behaviour = torch.where(mask, logprobs - drift, torch.tensor(float("nan")))  # never to be used where masked
        advantage = torch.randn((), generator=generator)
        sequences.append(
            {"token_ids": token_ids, "loss_mask": mask, "behaviour_logprobs": behaviour, "advantages": advantage.expand(length - 1).clone()}
        )
    save_file(
        {f"{name}.{i}": x for i, sequence in enumerate(sequences) for name, x in sequence.items()}, directory / "sequences.safetensors"
    )
    return sequences


def _logprobs(model: torch.nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    return model(token_ids[None, :-1]).logits[0].log_softmax(-1).gather(1, token_ids[1:, None])[:, 0]


def _minpro_loss(model: torch.nn.Module, sequences: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """MinPRO token by token in plain Python: weight = clip(min of earlier ratios * ratio, 0, 5), detached; token mean."""
    total = torch.zeros(())
    count = 0
    for sequence in sequences:
        logprobs = _logprobs(model, sequence["token_ids"])
        smallest = None
        for t in sequence["loss_mask"].nonzero()[:, 0].tolist():
            ratio = float((logprobs[t].detach().double() - sequence["behaviour_logprobs"][t].double()).exp())
            weight = min(max(ratio * (1.0 if smallest is None else smallest), 0.0), 5.0)
            smallest = ratio if smallest is None else min(smallest, ratio)
            total = total - weight * sequence["advantages"][t] * logprobs[t]
            count += 1
    return total / count


def _balance_loss(model: torch.nn.Module, sequences: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Experts * sum over experts of (share of choices * mean probability): sum over layers, mean over sequences; in plain loops.

    The choices are those that the router makes by itself, whatever it is told to visit.
    """
    gates: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: gates.append((out[0], out[0].topk(out[2].size(-1)).indices)))
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    total = torch.zeros(())
    for sequence in sequences:
        model(sequence["token_ids"][None, :-1])
    for hook in hooks:
        hook.remove()
    for logits, chosen in gates:
        experts = logits.size(1)
        for expert in range(experts):
            share = float((chosen == expert).sum()) / chosen.numel()
            total = total + experts * share * logits.softmax(-1)[:, expert].mean()
    return total / len(sequences)


class _Experts:
    """Watches the routers of a model and, where rows are given, has them visit these experts with the gates they give them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.rows: torch.Tensor | None = None  # of the sequence that comes next
        self.own: list[torch.Tensor] = []  # what each router chose, layer by layer
        for layer, block in enumerate(model.model.layers):
            block.mlp.gate.register_forward_hook(lambda _, __, out, layer=layer: self._choose(layer, *out))

    def _choose(self, layer: int, logits: torch.Tensor, weights: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.own.append(own.sort(-1).values)
        if self.rows is None:
            return logits, weights, own
        given = self.rows[layer].long()
        chosen = torch.where((given == 255).all(-1, keepdim=True), own, given)
        return logits, logits.gather(1, chosen).softmax(-1), chosen

    def take(self) -> torch.Tensor:
        """[layers, L - 1, k] since the last call."""
        own, self.own = self.own, []
        return torch.stack(own)


def _make_replayed(model: torch.nn.Module, experts: _Experts, directory: Path) -> Replayed:
    directory.mkdir()
    sequences = _make_sequences(model, directory, lengths=(13,) * 8)
    generator = torch.Generator().manual_seed(3)
    rows: list[torch.Tensor | None] = []
    for number in range(len(sequences)):
        drawn = torch.rand(model.config.num_hidden_layers, 12, 4, generator=generator).argsort(-1)[..., :2].to(torch.uint8)
        if number == 2:
            drawn[:, :5] = 255
        if number == 4:
            drawn[1, 7] = 255
        rows.append(None if number == 6 else drawn)
    save_file({f"experts.{i}": x for i, x in enumerate(rows) if x is not None}, directory / "experts.safetensors")
    experts.take()

    def loss(*, balanced: bool) -> torch.Tensor:
        total, count = torch.zeros(()), sum(int(sequence["loss_mask"].sum()) for sequence in sequences)
        for sequence, given in zip(sequences, rows, strict=True):
            experts.rows = given
            total = total + _minpro_loss(model, [sequence]) * sequence["loss_mask"].sum() / count
            if balanced:
                total = total + BALANCE_COEFFICIENT * _balance_loss(model, [sequence]) / len(sequences)
        return total

    logprobs, differing = [], 0
    for sequence, given in zip(sequences, rows, strict=True):
        experts.rows = given
        logprobs.append(_logprobs(model, sequence["token_ids"]).detach())
        own = experts.take()
        if given is not None:
            known = (given != 255).all(-1)
            differing += int(((given.long().sort(-1).values != own).any(-1) & known).sum())
    found = []
    for balanced in (False, True):
        model.zero_grad()
        loss(balanced=balanced).backward()
        found.append(_named(model, gradients=True))
    experts.rows = None
    experts.take()
    return Replayed(
        rows=rows,
        loss_masks=[sequence["loss_mask"] for sequence in sequences],
        logprobs=logprobs,
        gradients=found[0],
        balanced_gradients=found[1],
        differing=differing,
    )


def _named(model: torch.nn.Module, *, gradients: bool) -> dict[str, torch.Tensor]:
    """Copies under checkpoint names: transformers keeps all experts of a layer in one tensor, checkpoints name each expert's."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or not gradients
        tensor = (parameter.grad if gradients else parameter.detach()).clone()
        if name.endswith("experts.gate_up_proj"):
            for e, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                found[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                found[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for e, expert in enumerate(tensor):
                found[name.replace("down_proj", f"{e}.down_proj.weight")] = expert
        else:
            found[name] = tensor
    return found


def _make_family(name: str, directory: Path) -> Family:
    torch.manual_seed(0)
    moe, tied, layers = FAMILIES[name]
    model = _make_model(directory, moe=moe, tied=tied, layers=layers)
    sequences = _make_sequences(model, directory)
    logprobs = [_logprobs(model, sequence["token_ids"]).detach() for sequence in sequences]
    weights = _named(model, gradients=False)
    loss = _minpro_loss(model, sequences)
    loss.backward()
    gradients = _named(model, gradients=True)
    balanced = replayed = None
    chosen: list[torch.Tensor] = []
    if moe:
        (BALANCE_COEFFICIENT * _balance_loss(model, sequences)).backward()  # on top of MinPRO's
        balanced = _named(model, gradients=True)
        experts = _Experts(model)
        for sequence in sequences:
            _logprobs(model, sequence["token_ids"])
            chosen.append(experts.take())
        replayed = _make_replayed(model, experts, directory / "replayed")
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": ADAM["weight_decay"]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=tuple(ADAM["betas"]),
        eps=ADAM["eps"],
    )
    norms = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        _minpro_loss(model, sequences).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM["gradient_clip"])))
        optimizer.step()
    return Family(
        name=name,
        directory=directory,
        sequences=sequences,
        logprobs=logprobs,
        loss=float(loss.detach()),
        weights=weights,
        gradients=gradients,
        balanced_gradients=balanced,
        norms=norms,
        stepped=_named(model, gradients=False),
        chosen=chosen,
        replayed=replayed,
    )


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """The models of FAMILIES, each made once."""
    made: dict[str, Family] = {}

    def get(name: str) -> Family:
        if name not in made:
            made[name] = _make_family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What one run of actor_ranks.py left: tensors by name, one report per optimizer step, and what else it had to say."""

    tensors: dict[str, torch.Tensor]
    reports: list[dict[str, Any]]
    notes: dict[str, Any]

    def weights(self, when: str) -> dict[str, torch.Tensor]:
        """Exported weights "before" or "after" the steps, under Hugging Face names."""
        return {name.removeprefix(f"{when}."): x for name, x in self.tensors.items() if name.startswith(f"{when}.")}

    def gradients(self) -> dict[str, torch.Tensor]:
        """Read off the first step of the probe: AdamW with eps 1 moves a weight by rate * g / (|g| + 1).

        The rate is so large that the weight's own rounding disappears behind the step.
        """
        before, after = self.weights("before"), self.weights("after")
        found = {}
        for name in before:
            step = (before[name].double() - after[name].double()) / PROBE["learning_rate"]
            found[name] = (step / (1 - step.abs())).float()
        return found


PROBE: dict[str, Any] = {
    "optimizer": {"weight_decay": 0.0, "betas": [0.9, 0.98], "eps": 1.0, "gradient_clip": 1e9},
    "learning_rate": 1e4,
    "steps": 1,
    "check_model": True,
}
# One micro-batch with all lengths (several length classes of attention), against several small ones in the probe.
TRAIN: dict[str, Any] = {"optimizer": ADAM, "learning_rate": LEARNING_RATE, "steps": STEPS, "max_tokens": 400}


BALANCE = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": BALANCE_COEFFICIENT}


@pytest.fixture(scope="session")
def recipes() -> dict[str, dict[str, Any]]:
    """The two runs that every layout makes: one step that reveals gradients, three ordinary ones."""
    return {"probe": PROBE, "train": TRAIN}


@pytest.fixture(scope="session")
def replaying_probe() -> dict[str, Any]:
    """The probe over Family.replayed: a sequence a micro-batch, so more of them than stages, after a scoring pass; all recomputed."""
    plain = {name: value for name, value in PROBE.items() if name != "check_model"}
    return {**plain, "replay": True, "max_tokens": 16, "recompute": "full"}


@pytest.fixture(scope="session")
def balanced_probe() -> dict[str, Any]:
    """The probe with the experts' balance loss on top; see Family.balanced_gradients."""
    return {**PROBE, "megatron": BALANCE}


Jobs = dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]]  # name -> layout, runs by name
Launch = Callable[..., dict[str, dict[str, RunResult]]]


@pytest.fixture(scope="session")
def launch_actors(ranks: RankPool) -> Launch:
    """launch_actors(fixture_folder, out, jobs, python_path=()) -> results[job][run].

    All jobs have one world size. python_path: folders that come before this repository and its environment.
    """

    def launch(fixture: Path, out: Path, jobs: Jobs, *, python_path: tuple[Path, ...] = ()) -> dict[str, dict[str, RunResult]]:
        [world_size] = {layout["world_size"] for layout, _ in jobs.values()}
        requests = [
            {"name": name, "port": port, "layout": layout, "runs": runs}
            for (name, (layout, runs)), port in zip(jobs.items(), free_ports("127.0.0.1", len(jobs)), strict=True)
        ]
        out.mkdir(exist_ok=True)
        (out / "requests.json").write_text(json.dumps(requests))
        with RankPool(python_path=python_path) if python_path else contextlib.nullcontext(ranks) as pool:
            pool.run(Path(__file__).with_name("actor_ranks.py"), fixture, out, world_size=world_size)
        return {name: {run: _read_result(out / name / run) for run in runs} for name, (_, runs) in jobs.items()}

    return launch


def _read_result(folder: Path) -> RunResult:
    said = json.loads((folder / "reports.json").read_text())
    return RunResult(tensors=load_file(folder / "results.safetensors"), reports=said["reports"], notes=said["notes"])


def largest_relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Over all tensors: largest difference over largest expected value of that tensor."""
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


@pytest.fixture(scope="session")
def relative_error() -> Callable[..., tuple[float, str]]:
    return largest_relative_error


@pytest.fixture
def check_parity(request: pytest.FixtureRequest) -> Callable[[Family, str, dict[str, RunResult]], None]:
    """check_parity(family, layout's name, {"probe": ..., "train": ...}): everything equals the reference; one row of the table."""

    def check(family: Family, layout: str, results: dict[str, RunResult]) -> None:
        probe, train = results["probe"], results["train"]
        before = probe.weights("before")
        assert before.keys() in (family.weights.keys() - {"lm_head.weight"}, family.weights.keys())
        assert all(torch.equal(before[name], family.weights[name]) for name in before)
        scored = {f"logprobs.{i}": x for i, x in enumerate(family.logprobs)}
        logprob_error, worst_sequence = largest_relative_error({name: probe.tensors[name] for name in scored}, scored)
        gradient_error, worst_gradient = largest_relative_error(probe.gradients(), {name: family.gradients[name] for name in before})
        norms = [report["grad_norm"] for report in train.reports]
        norm_error = max(abs(found / expected - 1) for found, expected in zip(norms, family.norms, strict=True))
        after = train.weights("after")
        weight_error = max(float((after[name] - family.stepped[name]).abs().max()) for name in before)
        numbers = [f"{error:.1e}" for error in (logprob_error, gradient_error, norm_error, weight_error)]
        request.node.user_properties.append((PARITY, (family.name, layout, *numbers)))
        # 1e-5: fp32 rounding of sums of 100 terms in another order.
        assert logprob_error < 1e-5, worst_sequence
        assert gradient_error < 1e-5, worst_gradient
        assert norm_error < 1e-5, (norms, family.norms)
        assert probe.reports[0]["loss"] == pytest.approx(family.loss, rel=1e-5)
        # Torch alone in fp32 and in fp64 differ by 1.5e-7 after these steps of 1e-3 each.
        assert weight_error < 2e-6

    return check


@pytest.fixture
def check_replayed(request: pytest.FixtureRequest) -> Callable[[Family, str, RunResult], None]:
    """check_replayed(family, run's name, result of `replaying_probe`): as `check_parity`, with the rows of experts of Family.replayed."""

    def check(family: Family, name: str, found: RunResult) -> None:
        expected = family.replayed
        assert expected is not None
        logprobs = {f"logprobs.{i}": x for i, x in enumerate(expected.logprobs)}
        logprob_error, sequence = largest_relative_error({name: found.tensors[name] for name in logprobs}, logprobs)
        gradient_error, weight = largest_relative_error(found.gradients(), expected.gradients)
        request.node.user_properties.append((PARITY, (family.name, name, f"{logprob_error:.1e}", f"{gradient_error:.1e}", "", "")))
        assert logprob_error < 1e-5, sequence
        assert gradient_error < 1e-5, weight
        trained = [logprobs[mask] for logprobs, mask in zip(expected.logprobs, expected.loss_masks, strict=True)]
        assert found.notes["statistics"] == pytest.approx([float(torch.cat(trained).double().sum())], rel=1e-6)
        missing = sum(48 if rows is None else int((rows == 255).all(-1).sum()) for rows in expected.rows)
        assert found.notes["routing"] == {"replayed": 8 * 48 - missing, "missing": missing, "differing": expected.differing}
        assert missing == 48 + 4 * 5 + 1 and expected.differing > 200  # of 315: five of six random pairs are others

    return check

"""The actor on real gloo ranks against transformers and torch's AdamW in one process, fp32: log-probs, MinPRO gradients, three steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.attention import length_classes

ROOT = Path(__file__).resolve().parents[2]
# Off policy, packed, masked in the middle, lengths that no parallel size divides.
LENGTHS = (19, 7, 2, 24, 13, 11, 30, 5)
# eps near the median gradient (7e-4): with 1e-8 a gradient that cancels to 3e-9 is rounding alone, yet moves its weight by half a rate.
ADAM: dict[str, Any] = {"weight_decay": 0.1, "betas": [0.9, 0.98], "eps": 1e-4, "gradient_clip": 0.5}
# One micro-batch with all lengths (several length classes of attention), against several small ones in the probe.
TRAIN: dict[str, Any] = {"optimizer": ADAM, "learning_rate": 1e-3, "steps": 3, "max_tokens": 400}
# eps = 1 makes AdamW's first step lr * g / (|g| + 1): the weights then tell the gradient.
GRADIENT_PROBE = {"weight_decay": 0.0, "betas": [0.9, 0.98], "eps": 1.0, "gradient_clip": 1e9}
PROBE = {"optimizer": GRADIENT_PROBE, "learning_rate": 1.0, "steps": 1}


def make_model(directory: Path, *, moe: bool, tied: bool) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
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


def make_sequences(model: torch.nn.Module, directory: Path) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    sequences = []
    for length in LENGTHS:
        token_ids = torch.randint(0, 96, (length,), generator=generator)
        mask = torch.rand(length - 1, generator=generator) < 0.7
        mask[: length // 4] = False
        mask[-1] = True
        logprobs = reference_logprobs(model, token_ids).detach()
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


def reference_logprobs(model: torch.nn.Module, token_ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    logits = model(token_ids[None, :-1]).logits[0] / temperature
    return logits.log_softmax(-1).gather(1, token_ids[1:, None])[:, 0]


def reference_minpro_loss(model: torch.nn.Module, sequences: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """MinPRO token by token in plain Python: weight = clip(min of earlier ratios * ratio, 0, 5), detached; token mean."""
    total = torch.zeros(())
    count = 0
    for sequence in sequences:
        logprobs = reference_logprobs(model, sequence["token_ids"])
        smallest = None
        for t in sequence["loss_mask"].nonzero()[:, 0].tolist():
            ratio = float((logprobs[t].detach().double() - sequence["behaviour_logprobs"][t].double()).exp())
            weight = min(max(ratio * (1.0 if smallest is None else smallest), 0.0), 5.0)
            smallest = ratio if smallest is None else min(smallest, ratio)
            total = total - weight * sequence["advantages"][t] * logprobs[t]
            count += 1
    return total / count


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A model, its sequences, and everything transformers and torch say about them."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp(request.param)
    model = make_model(directory, moe=request.param == "moe", tied=request.param == "dense_tied")
    sequences = make_sequences(model, directory)
    logprobs = [reference_logprobs(model, sequence["token_ids"]).detach() for sequence in sequences]
    loss = reference_minpro_loss(model, sequences)
    loss.backward()
    gradients = split_experts({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    weights = split_experts({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    decayed = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": ADAM["weight_decay"]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=TRAIN["learning_rate"],
        betas=tuple(ADAM["betas"]),
        eps=ADAM["eps"],
    )
    norms = []
    for _ in range(TRAIN["steps"]):
        optimizer.zero_grad()
        reference_minpro_loss(model, sequences).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM["gradient_clip"])))
        optimizer.step()
    stepped = split_experts({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    return {
        "name": request.param,
        "directory": directory,
        "logprobs": logprobs,
        "loss": float(loss.detach()),
        "gradients": gradients,
        "weights": weights,
        "norms": norms,
        "stepped": stepped,
    }


def split_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers keeps all experts of a layer in one tensor; checkpoints name each expert's."""
    found = {}
    for name, tensor in tensors.items():
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


def run_ranks(fixture: Path, out: Path, layout: dict, runs: dict[str, dict]) -> dict[str, tuple[dict[str, torch.Tensor], list[dict]]]:
    """One launch for all runs: importing and joining costs more than they do."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout['world_size']}"]
    command += [str(Path(__file__).with_name("actor_ranks.py")), str(fixture), str(out), json.dumps({"layout": layout, "runs": runs})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: (load_file(out / name / "results.safetensors"), json.loads((out / name / "reports.json").read_text())) for name in runs}


def largest_relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


LAYOUTS = {
    "one rank": {"world_size": 1},
    "dp2": {"world_size": 2},
    "ep2": {"world_size": 2, "ep": 2},
    "tp2 sp": {"world_size": 2, "tp": 2, "sequence_parallel": True},
    "tp2 sp ep2": {"world_size": 2, "tp": 2, "sequence_parallel": True, "ep": 2},
    "etp2": {"world_size": 2, "etp": 2},
    "pp2": {"world_size": 2, "pp": 2},
    "cp2": {"world_size": 2, "cp": 2},
    "pp2 ep2": {"world_size": 4, "pp": 2, "ep": 2},
    "pp2 vpp2 ep2": {"world_size": 4, "pp": 2, "vpp": 2, "ep": 2},
    "ep4": {"world_size": 4, "ep": 4},
    "cp4": {"world_size": 4, "cp": 4},
    "tp2 sp etp2 ep2": {"world_size": 4, "tp": 2, "sequence_parallel": True, "etp": 2, "ep": 2},
    "tp2 sp cp2 pp2 ep2": {"world_size": 8, "tp": 2, "sequence_parallel": True, "cp": 2, "pp": 2, "ep": 2},
}


def test_one_micro_batch_of_all_sequences_needs_several_attention_grids() -> None:
    for multiple in (1, 4):  # padded as without context parallelism and under cp 2
        assert len(length_classes([-(-(length - 1) // multiple) * multiple for length in LENGTHS])) > 1


DENSE = ("one rank", "tp2 sp", "pp2")  # without experts the other layouts say nothing new


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("family", "layout"), [*(("moe", layout) for layout in LAYOUTS), *(("dense_tied", layout) for layout in DENSE)], indirect=["family"]
)
def test_logprobs_gradients_and_steps_equal_transformers(family: dict, layout: str, tmp_path: Path) -> None:
    done = run_ranks(family["directory"], tmp_path, LAYOUTS[layout], {"probe": PROBE, "train": TRAIN})

    results, reports = done["probe"]
    before = {name.removeprefix("before."): x for name, x in results.items() if name.startswith("before.")}
    assert before.keys() == family["weights"].keys() - {"lm_head.weight"} or before.keys() == family["weights"].keys()
    assert all(torch.equal(before[name], family["weights"][name]) for name in before)
    for i, expected in enumerate(family["logprobs"]):
        # 1e-5: fp32 rounding of sums of 100 terms in another order
        torch.testing.assert_close(results[f"logprobs.{i}"], expected, rtol=1e-5, atol=1e-5)
    assert reports[0]["loss"] == pytest.approx(family["loss"], rel=1e-5)
    gradients = {}
    for name in before:
        step = before[name].double() - results[f"after.{name}"].double()
        gradients[name] = (step / (1 - step.abs())).float()
    expected_gradients = {name: family["gradients"][name] for name in before}
    error, worst = largest_relative_error(gradients, expected_gradients)
    # The probe reads gradients off fp32 weights of size 0.5 to 1: absolute resolution 6e-8 against gradients of 1e-3 and more.
    assert error < 2e-4, worst

    results, reports = done["train"]
    assert [report["grad_norm"] for report in reports] == pytest.approx(family["norms"], rel=1e-5)
    for name in before:
        # Torch alone in fp32 and in fp64 differ by 1.5e-7 after these steps of 1e-3 each.
        torch.testing.assert_close(results[f"after.{name}"], family["stepped"][name], rtol=0, atol=2e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("family", ["moe"], indirect=True)
def test_a_checkpoint_continues_on_its_own_layout_bit_for_bit_and_on_another_closely(family: dict, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    first_half, whole = {**TRAIN, "steps": 2, "save_to": str(checkpoint)}, {**TRAIN, "steps": 4}
    runs = {"whole": whole, "reloaded": {**whole, "reload_before_step": 2}, "first_half": first_half}
    done = run_ranks(family["directory"], tmp_path / "ep2", LAYOUTS["ep2"], runs)
    expected, expected_reports = done["whole"]
    found, reports = done["reloaded"]
    assert reports == expected_reports
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    second_half = {**TRAIN, "load": str(checkpoint), "first_step": 2, "steps": 2}
    found, reports = run_ranks(family["directory"], tmp_path / "pp2", LAYOUTS["pp2"], {"second_half": second_half})["second_half"]
    halfway, _ = done["first_half"]
    weights = [name.removeprefix("after.") for name in halfway if name.startswith("after.")]
    assert all(torch.equal(found[f"before.{name}"], halfway[f"after.{name}"]) for name in weights)
    assert [report["policy_version"] for report in reports] == [3, 4]
    for key in ("loss", "grad_norm"):
        assert [report[key] for report in reports] == pytest.approx([report[key] for report in expected_reports[2:]], rel=1e-5)
    for name in weights:
        torch.testing.assert_close(found[f"after.{name}"], expected[f"after.{name}"], rtol=0, atol=2e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("family", ["moe"], indirect=True)
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_no_number(family: dict, recompute: str, tmp_path: Path) -> None:
    runs = {"stored": TRAIN, "recomputed": {**TRAIN, "recompute": recompute}}
    done = run_ranks(family["directory"], tmp_path, LAYOUTS["ep2"], runs)
    (stored, stored_reports), (recomputed, recomputed_reports) = done["stored"], done["recomputed"]
    assert recomputed_reports == stored_reports
    assert all(torch.equal(recomputed[name], stored[name]) for name in stored)

"""The actor on real gloo ranks against transformers and torch's AdamW in one process, fp32: log-probs, MinPRO gradients, three steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.layers.attention_grid import length_classes

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]  # the first test of a world size runs all of its layouts

SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {"world_size": 1},
    "dp2": {"world_size": 2},
    "dp3": {"world_size": 3},  # no power of two: buckets end with padding
    "ep2": {"world_size": 2, "ep": 2},
    "tp2 sp": {"world_size": 2, **SP},  # experts whole on both ranks: etp 1
    "tp2 sp ep2": {"world_size": 2, **SP, "ep": 2},
    "etp2": {"world_size": 2, "etp": 2},  # ep 1 and etp other than tp
    "pp2": {"world_size": 2, "pp": 2},
    "cp2": {"world_size": 2, "cp": 2},
    "pp2 ep2": {"world_size": 4, "pp": 2, "ep": 2},
    "pp2 vpp2 ep2": {"world_size": 4, "pp": 2, "vpp": 2, "ep": 2},
    "ep4": {"world_size": 4, "ep": 4},
    "cp4": {"world_size": 4, "cp": 4},
    "tp2 sp etp2 ep2": {"world_size": 4, **SP, "etp": 2, "ep": 2},
    "tp2 sp cp2 pp2 ep2": {"world_size": 8, **SP, "cp": 2, "pp": 2, "ep": 2},
}
COUNTED = {"count_embedding_as_layer": True, "count_loss_as_layer": True}
# Stages of other sizes than the others; under vpp 3 the first chunk is the embedding alone and the last one the head.
LAYOUTS["pp2, 1 and 3 layers"] = {"world_size": 2, "pp": 2, "layers_in_first_stage": 1}
LAYOUTS["pp2 vpp3, ends alone"] = {"world_size": 2, "pp": 2, "vpp": 3, **COUNTED}
# Without experts the other layouts say nothing new; tensor without sequence parallelism exists only here (experts demand both).
DENSE = {"one rank": LAYOUTS["one rank"], "tp2": {"world_size": 2, "tp": 2}, "tp2 sp": LAYOUTS["tp2 sp"], "pp2": LAYOUTS["pp2"]}
DENSE |= {name: LAYOUTS[name] for name in ("pp2, 1 and 3 layers", "pp2 vpp3, ends alone")}
FIVE = {
    "pp2, loss counted": {"world_size": 2, "pp": 2, "count_loss_as_layer": True},
    "pp2, 2 and 3 layers": {"world_size": 2, "pp": 2, "layers_per_stage": [2, 3]},
}
SIX = {
    "pp2 vpp2, ends counted": {"world_size": 2, "pp": 2, "vpp": 2, **COUNTED},
    "pp2 vpp2, 2 and 4 layers": {"world_size": 2, "pp": 2, "vpp": 2, "layers_in_first_stage": 2, "layers_in_last_stage": 4},
}
FAMILIES = {"moe": LAYOUTS, "dense_tied": DENSE, "moe_5_layers": FIVE, "moe_6_layers": SIX}
# The same layouts with something else about them: (layout, what the runs have besides). They must equal transformers all the same.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cp2 packed": ("cp2", {"max_tokens": 400}),
    "cp2, a sequence a micro-batch": ("cp2", {"max_tokens": 32}),
    "dp2, uneven micro-batches": ("dp2", {"max_tokens": 51}),
    "ep2 allgather": ("ep2", {"megatron": {"moe_token_dispatcher_type": "allgather"}}),
    "tp2 sp ep2 allgather": ("tp2 sp ep2", {"megatron": {"moe_token_dispatcher_type": "allgather"}}),
    "router in float64": ("one rank", {"megatron": {"moe_router_dtype": "fp64"}}),
    # What CUDA runs, through the CPU's reference.
    "one rank, attention without masks": ("one rank", {"attention": "varlen"}),
    "cp2, attention without masks": ("cp2", {"attention": "varlen"}),
    "cp4, attention without masks": ("cp4", {"attention": "varlen"}),
    "pp2, outputs freed": ("pp2", {"megatron": {"deallocate_pipeline_outputs": True, "batch_p2p_sync": False}}),
}
BALANCED = ("one rank", "dp2", "ep2", "tp2 sp", "pp2", "cp2")
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 4000}  # several buckets
OVERLAPPED = ("dp2", "dp3", "ep2", "pp2", "pp2 vpp2 ep2")
RECOMPUTED = ("full", "selective")
# Routing replay: every layout with full recompute, and (layout, what is otherwise).
REPLAYED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}, nothing recomputed": (name, {"recompute": "none"}) for name in ("ep2", "pp2", "cp2", "tp2 sp", "pp2 vpp2 ep2")},
    **{f"{name}, selective recompute": (name, {"recompute": "selective"}) for name in ("ep2", "pp2")},
    **{f"{name} allgather": (name, {"megatron": {"moe_token_dispatcher_type": "allgather"}}) for name in ("ep2", "tp2 sp ep2")},
}
REPLAYED_AND_BALANCED = ("tp2 sp", "cp2")
RECORDED = ("one rank", "ep2", "tp2 sp", "pp2", "cp2", "pp2 vpp2 ep2", "tp2 sp cp2 pp2 ep2")
POISONED = {"dp2": 1, "cp2": 1, "pp2": 1, "tp2 sp": 1}  # the one rank that meets a NaN
POISON = 3  # token ids 3, 11, 19, ...
SWAPPED = ("one rank", "ep2", "tp2 sp", "pp2", "pp2 vpp2 ep2", "tp2 sp cp2 pp2 ep2")
BF16 = ("one rank", "ep2", "tp2 sp", "cp2")
TAMPERED = ("one rank", "ep2")
# What Megatron-Core would do without an error, were the options not refused by name.
TAMPER: dict[str, dict[str, Any]] = {
    "random experts": {"moe_router_force_load_balancing": True},
    "scaled experts": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    "groups of experts": {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "softmax before the choice": {"moe_router_pre_softmax": True},
    "another number of experts": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
}
# What shows in bf16 too: this model's experts have a small share in its log-probs.
LARGER_THAN_BF16 = {"random experts", "scaled experts", "another number of experts"}


@pytest.fixture(scope="module")
def results(
    families: Callable,
    recipes: dict[str, dict],
    balanced_probe: dict[str, Any],
    replaying_probe: dict[str, Any],
    launch_actors: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], dict]:
    """results(family, layout) -> {run: RunResult}. All layouts of one family and world size run in one launch, at the first question."""
    made: dict[tuple[str, int], dict[str, dict] | BaseException] = {}

    def jobs_of(family: str, world_size: int) -> dict[str, tuple[dict, dict]]:
        jobs = {name: (layout, dict(recipes)) for name, layout in FAMILIES[family].items() if layout["world_size"] == world_size}
        if family != "moe":
            if "pp2" in jobs:  # tied embeddings on two stages
                jobs["pp2"][1]["swapped"] = {**recipes["train"], "swap_weights": True}
            return jobs
        for name, (_, runs) in jobs.items():
            probe, train = recipes["probe"], recipes["train"]
            for variant, (base, change) in VARIANTS.items():
                if base == name:
                    runs |= {f"{variant}/probe": {**probe, **change}, f"{variant}/train": {**train, **change}}
            runs["replay"] = replaying_probe
            if name in RECORDED:
                runs["recorded"] = {**probe, "record": True, "check_model": False}
            runs |= {f"replay, {variant}": {**replaying_probe, **change} for variant, (base, change) in REPLAYED.items() if base == name}
            if name in REPLAYED_AND_BALANCED:
                runs["replay, balanced"] = {**replaying_probe, "megatron": balanced_probe["megatron"]}
            if name in ("dp2", "pp2"):
                runs["misrouted"] = {**replaying_probe, "misroute": True}
            if name in BALANCED:
                runs["balanced"] = balanced_probe
            if name in OVERLAPPED:
                runs["overlapped"] = {**train, "max_tokens": 48, "megatron": OVERLAP}
                runs["not overlapped"] = {**train, "max_tokens": 48}
                runs["overlapped, swapped"] = {**runs["overlapped"], "swap_weights": True, "reload_before_step": 2}
            if name in SWAPPED:
                runs["swapped"] = {**train, "swap_weights": True, "reload_before_step": 2}
            if name in POISONED:
                runs["poisoned"] = {**train, "poison": {"rank": POISONED[name], "residue": POISON}}
            if name in BF16:
                runs["bf16"] = {**probe, "dtype": "bfloat16"}
                runs["bf16 train"] = {**train, "dtype": "bfloat16"}
                runs["bf16 swapped"] = {**runs["bf16 train"], "swap_weights": True}
            if name == "ep2":
                runs |= {f"recompute {kind}": {**train, "recompute": kind} for kind in RECOMPUTED}
                runs["recompute full, balanced"] = {**balanced_probe, "recompute": "full"}
            if name == "cp2":
                runs["counting"] = {
                    **replaying_probe,
                    "recompute": "none",
                    "megatron": balanced_probe["megatron"],
                    "count_micro_batches": True,
                }
            if name in TAMPERED:
                runs |= {
                    f"tampered {dtype}": {**probe, "dtype": dtype, "tamper": list(TAMPER.values())} for dtype in ("float32", "bfloat16")
                }
            if name == "dp2":
                runs["refusing"] = {**train, "refuse": True}
        return jobs

    def get(family: str, layout: str) -> dict:
        key = (family, FAMILIES[family][layout]["world_size"])
        if key not in made:
            try:
                made[key] = launch_actors(families(family).directory, tmp_path_factory.mktemp("ranks"), jobs_of(*key))
            except AssertionError as error:  # every test that asks fails with it, without another launch
                made[key] = error
        found = made[key]
        if isinstance(found, BaseException):
            raise found
        return found[layout]

    return get


def test_one_micro_batch_of_all_sequences_needs_several_attention_grids(families: Callable) -> None:
    lengths = [len(sequence["loss_mask"]) for sequence in families("moe").sequences]
    for multiple in (1, 4):  # padded as without context parallelism and under cp 2
        assert len(length_classes([-(-length // multiple) * multiple for length in lengths])) > 1


@pytest.mark.parametrize(("family", "layout"), [(family, layout) for family, layouts in FAMILIES.items() for layout in layouts])
def test_logprobs_gradients_and_steps_equal_transformers(
    family: str, layout: str, families: Callable, results: Callable, check_parity: Callable
) -> None:
    check_parity(families(family), layout, results(family, layout))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_dispatcher_and_micro_batch_counts_change_no_number(
    variant: str, families: Callable, results: Callable, check_parity: Callable
) -> None:
    done = results("moe", VARIANTS[variant][0])
    runs = {name: done[f"{variant}/{name}"] for name in ("probe", "train")}
    check_parity(families("moe"), variant, runs)
    if "uneven" in variant:
        assert runs["probe"].notes["empty_micro_batches"] > 0


@pytest.mark.parametrize(("layout", "run"), [*((layout, "probe") for layout in LAYOUTS), *((layout, "bf16") for layout in BF16)])
def test_the_built_model_equals_a_plain_forward_pass_over_its_export(layout: str, run: str, families: Callable, results: Callable) -> None:
    check = results("moe", layout)[run].notes["model_check"]
    assert check["num_tokens"] == sum(len(logprobs) for logprobs in families("moe").logprobs)
    median, mean = (2e-6, 1e-5) if run == "probe" else (0.03, 0.1)
    assert 0 < check["median"] <= median and check["mean"] <= mean
    assert check["median"] <= check["allowed_median"] and check["mean"] <= check["allowed_mean"]


@pytest.mark.parametrize(("dtype", "kinds"), [("float32", set(TAMPER)), ("bfloat16", LARGER_THAN_BF16)])
@pytest.mark.parametrize("layout", TAMPERED)
def test_a_model_that_was_changed_behind_its_options_is_refused(layout: str, dtype: str, kinds: set[str], results: Callable) -> None:
    said = dict(zip(TAMPER, results("moe", layout)[f"tampered {dtype}"].notes["tampered"], strict=True))
    for kind in kinds:
        words = "the actor trains another model than the one that its exported weights describe"
        assert words in said[kind].get("refused", ""), (kind, said)


@pytest.mark.parametrize("layout", BALANCED)
def test_the_routers_balance_loss_adds_the_same_gradient_on_every_layout(
    layout: str, families: Callable, results: Callable, relative_error: Callable
) -> None:
    expected = families("moe").balanced_gradients
    assert relative_error(families("moe").gradients, expected)[0] > 0.1  # it shows
    error, worst = relative_error(results("moe", layout)["balanced"].gradients(), expected)
    assert error < 1e-5, worst


@pytest.mark.parametrize(
    ("family", "layout", "swapped", "plain"),
    [
        *(("moe", layout, "swapped", "train") for layout in SWAPPED),
        *(("moe", layout, "overlapped, swapped", "overlapped") for layout in OVERLAPPED),
        *(("moe", layout, "bf16 swapped", "bf16 train") for layout in BF16),
        ("dense_tied", "pp2", "swapped", "train"),
    ],
)
def test_kept_weights_score_as_before_and_training_goes_on_bit_for_bit(
    family: str, layout: str, swapped: str, plain: str, results: Callable
) -> None:
    swapping, undisturbed = (results(family, layout)[name] for name in (swapped, plain))
    assert swapping.notes["kept"] == [True, True] and swapping.notes["kept_versions"] == [0, 0]
    assert swapping.reports == undisturbed.reports
    assert all(torch.equal(swapping.tensors[name], expected) for name, expected in undisturbed.tensors.items())


@pytest.mark.parametrize("layout", OVERLAPPED)
def test_overlapped_communication_changes_no_number(layout: str, results: Callable) -> None:
    overlapped, plain = (results("moe", layout)[name] for name in ("overlapped", "not overlapped"))
    for key in ("loss", "grad_norm"):
        # Other buckets, other order of the norm's sum.
        assert [report[key] for report in overlapped.reports] == pytest.approx([report[key] for report in plain.reports], rel=1e-6)
    for name, expected in plain.tensors.items():
        torch.testing.assert_close(overlapped.tensors[name], expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_recomputation_changes_no_number(recompute: str, results: Callable) -> None:
    stored, recomputed = (results("moe", "ep2")[name] for name in ("train", f"recompute {recompute}"))
    assert recomputed.reports == stored.reports
    assert all(torch.equal(recomputed.tensors[name], stored.tensors[name]) for name in stored.tensors)


def test_the_balance_loss_survives_recomputation(results: Callable) -> None:
    stored, recomputed = (results("moe", "ep2")[name].gradients() for name in ("balanced", "recompute full, balanced"))
    assert all(torch.equal(recomputed[name], stored[name]) for name in stored)


def test_a_micro_batch_leaves_memory_when_it_is_done(results: Callable) -> None:
    alive = results("moe", "cp2")["counting"].notes["micro_batches_alive"]
    assert len(alive) > 3
    assert alive == list(range(len(alive) - 1, -1, -1))


@pytest.mark.parametrize("layout", BF16)
def test_bf16_stays_near_fp32(layout: str, families: Callable, results: Callable) -> None:
    family, run = families("moe"), results("moe", layout)["bf16"]
    found = torch.cat([run.tensors[f"logprobs.{i}"] for i in range(len(family.logprobs))])
    # Numbers of size 5 out of some 20 roundings of 2^-9 each; a token whose experts change may be further off.
    assert float((found - torch.cat(family.logprobs)).abs().median()) < 0.03
    gradients = run.gradients()
    numerator = sum(float((gradients[name] * family.gradients[name]).sum()) for name in gradients)
    norms = [sum(float(x[name].square().sum()) for name in gradients) ** 0.5 for x in (gradients, family.gradients)]
    assert numerator / (norms[0] * norms[1]) > 0.95
    assert norms[0] / norms[1] == pytest.approx(1, abs=0.1)


# -- what stops a step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", POISONED)
def test_a_nan_on_one_rank_stops_all_ranks_together_and_moves_no_weight(layout: str, families: Callable, results: Callable) -> None:
    run, undisturbed = (results("moe", layout)[name] for name in ("poisoned", "train"))
    said = run.notes["poison"]["said"]
    assert said[0] == said[1]
    consequences = ("nothing is scored", "nothing changed, the policy stays at version 0", "not stepped, the policy stays at version 0")
    for message, consequence in zip(said[0], consequences, strict=True):
        found = re.fullmatch(
            rf"log-prob is nan in sequence (\d+), position (\d+), on rank 1 \(\d+ such tokens .*\); {consequence}", message
        )
        assert found, message
        sequence, position = families("moe").sequences[int(found[1])], int(found[2])
        assert sequence["token_ids"][position + 1] % 8 == POISON
        assert sequence["loss_mask"][position]
    assert run.notes["poison"]["weights_moved"] == []
    # The actor goes on as if nothing had been: optimizer, counters and all.
    assert run.reports == undisturbed.reports
    assert all(torch.equal(run.tensors[name], undisturbed.tensors[name]) for name in undisturbed.tensors)


def test_the_poison_also_lies_where_nothing_is_trained(families: Callable) -> None:
    sequences = families("moe").sequences
    trained = [bool(s["loss_mask"][t]) for s in sequences for t in (s["token_ids"][1:] % 8 == POISON).nonzero()[:, 0].tolist()]
    assert set(trained) == {True, False}


def test_bad_mini_batches_are_refused_before_anything_is_exchanged(families: Callable, results: Callable) -> None:
    trained = int(families("moe").sequences[0]["loss_mask"].nonzero()[0, 0])
    assert results("moe", "dp2")["refusing"].notes["refusals"] == [
        "minibatch: none of its 0 sequences has a trained token",
        "minibatch: none of its 8 sequences has a trained token",
        "actor.max_tokens_per_micro_batch: 400 is less than sequence 1 with 499 positions",
        "sequence 1: token_ids holds 191, expected 0 to 95",
        "sequence 1: token_ids holds -88, expected 0 to 95",
        "sequence 1: streams ['advantages'], expected ['advantages', 'behaviour_logprobs'] as in sequence 0",
        f"sequence 1: behaviour_logprobs is nan at position {trained}, where loss_mask is True",
        f"sequence 1: advantages is -inf at position {trained}, where loss_mask is True",
    ]


# -- routing replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "run"), [*((x, "replay") for x in LAYOUTS), *((x, f"replay, {v}") for v, (x, _) in REPLAYED.items())])
def test_given_experts_are_visited_on_every_layout(
    layout: str, run: str, families: Callable, results: Callable, check_replayed: Callable
) -> None:
    check_replayed(families("moe"), f"{layout}, {run}" if run == "replay" else run, results("moe", layout)[run])


@pytest.mark.parametrize("layout", REPLAYED_AND_BALANCED)
def test_the_balance_loss_speaks_of_the_routers_own_choice_under_replay(
    layout: str, families: Callable, results: Callable, relative_error: Callable
) -> None:
    expected = families("moe").replayed
    assert relative_error(expected.gradients, expected.balanced_gradients)[0] > 0.1  # it shows
    error, worst = relative_error(results("moe", layout)["replay, balanced"].gradients(), expected.balanced_gradients)
    assert error < 1e-5, worst


@pytest.mark.parametrize("layout", RECORDED)
def test_replaying_the_recorded_choice_changes_no_number(layout: str, families: Callable, results: Callable) -> None:
    recorded, live = (results("moe", layout)[name] for name in ("recorded", "probe"))
    for number, chosen in enumerate(families("moe").chosen):
        assert torch.equal(recorded.tensors[f"recorded.{number}"].sort(-1).values, chosen.float())
    assert recorded.reports == live.reports
    assert all(torch.equal(recorded.tensors[name], expected) for name, expected in live.tensors.items())
    rows = sum(chosen[..., 0].numel() for chosen in families("moe").chosen)
    assert recorded.notes["routing"] == {"replayed": rows, "missing": 0, "differing": 0}


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_rows_that_no_router_chose_stop_all_ranks_and_move_no_weight(layout: str, results: Callable) -> None:
    found = results("moe", layout)["misrouted"].notes["misroute"]
    assert found["said"][0] == found["said"][1]
    *wrong, recording, unasked = found["said"][0]
    one = "experts: 1 of 315 rows of a token and layer do not hold different ids from 0 to 3"
    shape = "sequence 0: experts of {}; expected 4 layers, 2 a token, torch.uint8"
    expected = [
        "experts: 48 of 315 rows of a token and layer do not hold different ids from 0 to 3",
        *[one] * 3,
        shape.format("3 layers, 2 a token, torch.uint8"),
        shape.format("4 layers, 1 a token, torch.uint8"),
        shape.format("4 layers, 2 a token, torch.int16"),
    ]
    assert wrong == [message for message in expected for _ in range(2)]  # scoring and update
    assert recording == "sequence 0: has rows of experts; expected none in a pass that records them"
    asked = 48 if layout == "dp2" else 96  # of one layer, by the one rank whose first router does not ask
    assert unasked == f"experts: {asked} rows of a token and layer were not asked for by their routers"
    assert found["weights_moved"] == []


# -- checkpoints ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_continues_exactly_and_on_another_layout_closely(
    families: Callable, recipes: dict[str, dict], launch_actors: Callable, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    train = recipes["train"]
    first_half, whole = {**train, "steps": 2, "save_to": str(checkpoint)}, {**train, "steps": 4}
    runs = {"whole": whole, "reloaded": {**whole, "reload_before_step": 2}, "first half": first_half}
    second_half = {**train, "load": str(checkpoint), "first_step": 2, "steps": 2}
    jobs = {"ep2": (LAYOUTS["ep2"], runs), "pp2, 1 and 3 layers": (LAYOUTS["pp2, 1 and 3 layers"], {"second half": second_half})}
    # The other way round: stages of other sizes save, even ones and others load.
    uneven = tmp_path / "uneven"
    jobs["pp2, 1 and 3 layers"][1]["first half"] = {**first_half, "save_to": str(uneven)}
    for layout in ("pp2", "pp2 vpp3, ends alone"):
        jobs[layout] = LAYOUTS[layout], {"second half": {**second_half, "load": str(uneven)}}
    jobs["dp2"] = LAYOUTS["dp2"], {name: runs[name] for name in ("whole", "reloaded")}
    done = launch_actors(families("moe").directory, tmp_path / "ranks", jobs)

    for layout in ("ep2", "dp2"):
        expected, found = done[layout]["whole"], done[layout]["reloaded"]
        assert found.reports == expected.reports
        assert found.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)

    expected, halfway = done["ep2"]["whole"], done["ep2"]["first half"].weights("after")
    for layout in ("pp2, 1 and 3 layers", "pp2", "pp2 vpp3, ends alone"):
        found = done[layout]["second half"]
        for name, weight in halfway.items():
            torch.testing.assert_close(found.weights("before")[name], weight, rtol=0, atol=0 if layout == "pp2, 1 and 3 layers" else 2e-6)
        assert [report["policy_version"] for report in found.reports] == [3, 4]
        for key in ("loss", "grad_norm"):
            expected_values = [report[key] for report in expected.reports[2:]]
            assert [report[key] for report in found.reports] == pytest.approx(expected_values, rel=1e-5)
        for name, weight in expected.weights("after").items():
            torch.testing.assert_close(found.weights("after")[name], weight, rtol=0, atol=2e-6)

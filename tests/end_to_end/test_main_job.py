"""The main job, shortened: what a finished run leaves behind, and that its numbers hang together."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_minpro.cluster.facts import server_packages
from megatron_minpro.objectives.by_place import SHARES, STRETCHES
from megatron_minpro.tracking.metrics_table import METRICS
from megatron_minpro.tracking.token_records import read_token_records
from megatron_minpro.tracking.versions import read_versions
from rollout.sglang.environment import default_server_python

pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(2400)]
UPDATES, STALENESS, STEPS, RESPONSES, GROUP_SIZE = 4, 2, 5, 64, 8


def test_summary_counts_every_rollout_once_and_has_all_keys(finished_run: dict[str, Any]) -> None:
    summary = json.loads((finished_run["dir"] / "summary.json").read_text())
    assert {"reward_first", "reward_last", "pass_at_1_before", "pass_at_1_after", "pass_at_8_before", "pass_at_8_after"} <= summary.keys()
    assert summary["global_steps"] == STEPS
    assert summary["updates"] == STEPS * UPDATES
    assert (summary["lag_min"], summary["lag_max"]) == (UPDATES * STALENESS, UPDATES * (STALENESS + 1) - 1)
    assert summary["rollouts_sampled"] == summary["rollouts_trained"] == STEPS * RESPONSES
    assert summary["rollouts_lost"] == 0
    assert {"sample", "score", "update", "sync", "base_model"} <= summary["seconds"].keys()
    assert summary["tokens_per_second"] > 0


def test_each_batch_is_trained_exactly_n_steps_after_it_was_sampled(finished_run: dict[str, Any]) -> None:
    rows = finished_run["metrics"]
    assert [row["global_step"] for row in rows] == list(range(STEPS + STALENESS))
    assert [row.get("batch/sampled_at_step") for row in rows] == [None, None, 0, 1, 2, 3, 4]
    lags = [(row["batch/lag_min"], row["batch/lag_max"]) for row in rows[STALENESS:]]
    assert lags == [(0, 3), (4, 7), (8, 11), (8, 11), (8, 11)]
    assert [row["policy/version"] for row in rows] == [0, 0, 4, 8, 12, 16, 20]


def test_a_run_logs_every_metric_of_the_table(finished_run: dict[str, Any]) -> None:
    logged = {name for row in finished_run["metrics"] for name in row} - {"global_step"}
    only_with_options = ("correction/", "routing/", "centering/", "time/evaluate", "rollout/rounds", "rollout/equal_groups")
    expected = {metric.name for metric in METRICS if not metric.name.startswith((*only_with_options, "rollout/dropped"))}
    stretches = (*STRETCHES[6:], *SHARES[:1])  # no response has a 64th token, so none has a first percent
    logs = ("log_ratio", "log_prefix_min")
    along = ("weight", *logs, *(f"{group}_p{percent}" for group in logs for percent in ("05", "50", "95")))
    too_long = {f"{group}/{stretch}" for group in along for stretch in stretches}
    assert logged == expected - too_long


def test_the_folder_says_what_the_run_ran_with(finished_run: dict[str, Any]) -> None:
    [attempt] = read_versions(finished_run["dir"])
    assert attempt.global_step == 0
    assert {name: attempt.versions[name] for name in ("torch", "megatron-core")} == {
        name: metadata.version(name) for name in ("torch", "megatron-core")
    }
    assert attempt.versions["sglang"] == server_packages(default_server_python())["sglang"]
    assert attempt.versions["cpu"] and "gpu" not in attempt.versions


def test_tensorboard_has_histograms_and_responses_of_trained_batches(finished_run: dict[str, Any]) -> None:
    events = EventAccumulator(str(finished_run["dir"] / "tensorboard"), size_guidance={"histograms": 0, "tensors": 0})
    events.Reload()
    trained = {row["global_step"]: row for row in finished_run["metrics"] if "batch/tokens" in row}
    for name in ("log_ratio", "log_prefix_min"):
        found = {event.step: event.histogram_value for event in events.Histograms(name)}
        assert {step: value.num for step, value in found.items()} == {step: row["batch/tokens"] for step, row in trained.items()}
        assert all(value.min <= trained[step][f"{name}/p01"] < trained[step][f"{name}/p99"] <= value.max for step, value in found.items())
        by_share = [events.Histograms(f"{name}_histogram/{share}") for share in SHARES[1:]]
        counts = [{event.step: event.histogram_value.num for event in of_share} for of_share in by_share]
        assert {step: sum(of_share.get(step, 0) for of_share in counts) for step in trained} == {
            step: value.num for step, value in found.items()
        }
    for number in range(3):
        shown = events.Tensors(f"response/{number}/text_summary")
        assert [event.step for event in shown] == list(trained)
        for event in shown:
            sampled = finished_run["dir"] / f"rollouts/step_{trained[event.step]['batch/sampled_at_step']:06d}.jsonl"
            record = json.loads(sampled.read_text().splitlines()[number * GROUP_SIZE])
            assert f"\n    {record['prompt'].splitlines()[0]}\n" in event.tensor_proto.string_val[0].decode()


def test_the_console_tells_the_phases_of_the_start_and_every_step(finished_run: dict[str, Any]) -> None:
    said = [line.partition("  ") for line in finished_run["out"].splitlines()]
    told = [rest.removeprefix("undisturbed: ") for stamp, _, rest in said if stamp.count(":") == 2]
    first_step = next(index for index, rest in enumerate(told) if rest.startswith("step 0  "))
    before = ["base model", "starting servers and ranks", "0 of 1 servers answer", "evaluation before"]
    assert [rest for rest in told[:first_step] if rest in before] == before
    assert {"building the model", "waiting for servers", "checking the model"} & set(told[:first_step]), told
    steps = [rest.split("  ")[:2] for rest in told if rest.startswith("step ")]
    assert steps == [[f"step {step}", f"trained {max(0, step - 1)}/{STEPS}"] for step in range(STEPS + STALENESS)]


def test_server_and_trainer_score_the_same_tokens_alike(finished_run: dict[str, Any]) -> None:
    gaps = [row["engine_logprob_gap/mean"] for row in finished_run["metrics"] if "engine_logprob_gap/mean" in row]
    assert len(gaps) == STEPS
    # fp32 on both sides, sums in another order. The mean, as a tie of two experts' gates may send one token elsewhere.
    assert max(gaps) < 1e-5


def test_kept_rollouts_can_be_read_and_carry_their_version(finished_run: dict[str, Any]) -> None:
    for step, version in enumerate([0, 0, 0, 4, 8]):
        records = [json.loads(line) for line in (finished_run["dir"] / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()]
        assert len(records) == RESPONSES
        assert {record["policy_version"] for record in records} == {version}
        mean = sum(record["reward"] for record in records) / len(records)
        assert finished_run["metrics"][step]["reward/sampled"] == pytest.approx(mean)


def test_two_groups_of_each_batch_are_recorded_token_by_token(finished_run: dict[str, Any]) -> None:
    """Once each, with the text and reward of the rollouts, under the weights of their lag."""
    lines = {}
    for step in range(STEPS):
        text = (finished_run["dir"] / f"rollouts/step_{step:06d}.jsonl").read_text()
        lines |= {record["sample_id"]: record for record in map(json.loads, text.splitlines())}
    files = [read_token_records(path) for path in sorted((finished_run["dir"] / "tokens").iterdir())]
    recorded = [(records, response) for records in files for response in records.responses]
    assert len({response.sample_id for _, response in recorded}) == len(recorded) == STEPS * 2 * GROUP_SIZE
    for records, response in recorded:
        line = lines[response.sample_id]
        for name in ("reward", "advantage", "num_response_tokens", "group"):
            assert getattr(response, name) == line[name], name
        assert records.sampled_at_step == records.global_step - STALENESS
        assert records.lag == records.policy_version - line["policy_version"]
        assert records.policy_version == UPDATES * records.sampled_at_step + records.update
    for records in files:
        gap = records.streams["engine_logprobs"] - records.streams["behaviour_logprobs"]
        assert abs(gap).mean() < 1e-5


def test_exported_policy_is_the_trained_one_and_transformers_loads_it(finished_run: dict[str, Any], short_run_settings: list[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = finished_run["dir"] / "policy"
    model = AutoModelForCausalLM.from_pretrained(policy)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 2 * 3 - 4 + 5 * 6 - 7 :"}], add_generation_prompt=True)
    logits = model(torch.tensor([prompt["input_ids"] if not isinstance(prompt, list) else prompt])).logits
    assert torch.isfinite(logits).all()
    base_folder = Path(short_run_settings[2].removeprefix("model.path="))
    assert json.loads((base_folder / "warm_up.json").read_text())["warm_up"]["num_steps"] == 60  # how it was made
    base = load_file(base_folder / "model.safetensors")
    trained = load_file(policy / "model.safetensors")
    assert base.keys() == trained.keys()
    changed = [name for name in base if not torch.equal(base[name], trained[name])]
    assert len(changed) > 0.9 * len(base)


def test_the_page_holds_the_curves_and_tokens_of_the_run(finished_run: dict[str, Any]) -> None:
    path = finished_run["dir"] / "report.html"
    assert f"Its page: {path}" in " ".join(finished_run["out"].split())
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert data is not None
    [run] = json.loads(data[1])["runs"]
    assert run["columns"]["reward/trained"][STALENESS:] == [
        pytest.approx(row["reward/trained"]) for row in finished_run["metrics"][STALENESS:]
    ]
    assert len(run["tokens"]["responses"]) == STEPS * 2 * 8  # two groups of eight of each batch
    assert "".join(text for _, text, _ in run["tokens"]["pieces"] if "<|" in text) != ""  # the run's own tokenizer
    assert all("answer" in response for response in run["tokens"]["responses"])


def test_pictures_events_and_checkpoints_are_there_and_whole(finished_run: dict[str, Any]) -> None:
    run_dir = finished_run["dir"]
    for name in ("reward.png", "entropy.png", "pass_at_k.png"):
        assert (run_dir / "plots" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert (run_dir / "checkpoints/latest").read_text() == "step_000007"
    kept = ["latest", *(f"step_{step:06d}" for step in (4, 5, 6, 7))]  # every 2 steps, where sampling ends, and the last
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == kept
    assert not [path for path in run_dir.rglob("*") if "partial" in path.name]


def test_traced_steps_name_their_phases_beside_a_prediction(finished_run: dict[str, Any]) -> None:
    folder = finished_run["dir"] / "profile"
    for rank in range(2):
        with gzip.open(folder / f"steps_3-4_rank_{rank}.pt.trace.json.gz") as file:
            names = Counter(event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation")
        # Sampling runs beside them in a thread; nobody samples with the weights of step 4.
        expected = {"global step 3": 1, "global step 4": 1, "score": 2, "update": 2 * UPDATES, "wait": 2, "sync": 1}
        assert {name: names[name] for name in expected} == expected
        assert "global step 5" not in names
    table = (folder / "phases.md").read_text()
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in table.splitlines() if "|" in line}
    measured = [row["time/update"] for row in finished_run["metrics"][3:5]]
    assert float(rows["update"][0]) == pytest.approx(sum(measured) / 2, rel=0.01)
    assert float(rows["update"][1]) > 0 and rows["sample"][1] == "-"  # the planner knows no CPU server
    assert "Traces and predictions" in " ".join(finished_run["out"].split())


def test_no_process_survives_and_the_last_line_tells_the_result(finished_run: dict[str, Any]) -> None:
    assert finished_run["survivors"] == []
    assert "5 global steps (20 updates) of minpro with staleness 2 (policy lag 8 to 11 updates after the ramp)" in finished_run["out"]


def test_weights_of_the_servers_were_proven_equal_after_every_sync(finished_run: dict[str, Any]) -> None:
    # At the start, after steps 2 and 3, with whose weights batches 3 and 4 are sampled, and before the last measurement.
    assert finished_run["log"].count("equal the actor's") == 4

"""What can be known to be wrong before a process starts or a GPU is spent."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoints_convert.hf_config import Architecture, read_architecture
from checkpoints_convert.servable import refuse_tied_experts
from megatron_minpro.cluster.facts import Finding, NodeReport
from megatron_minpro.config import RunConfig
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.loop.held_out import held_out_prompts
from megatron_minpro.run import base_model
from megatron_minpro.run.plug_ins import check_plug_ins
from megatron_minpro.run.serving import check_server_options
from parallel.actor import check_option_names
from parallel.capabilities import Capabilities
from parallel.megatron_options import check_effect, check_machine_options
from rollout.sglang.environment import default_server_python

MAX_CLOCK_DIFFERENCE_S = 5.0
MIN_FREE_GIB = 1.0


def check_settings(config: RunConfig) -> Architecture | None:
    """Everything that needs neither the machine nor the prompts. The model's architecture, None where it is not known yet.

    Raises ValueError for a plug-in that cannot be used, a layout that the model does not fit, responses longer than its positions, and
    unknown Megatron or SGLang options.
    """
    check_plug_ins(config)
    check_option_names(config.megatron)
    check_server_options(config)
    architecture = _known_architecture(config)
    if architecture is not None:
        refuse_tied_experts(architecture, source=f"model.path {config.model.path}")
        config.layout.check_model(architecture)
        check_effect(config.megatron, architecture, recompute=config.actor.recompute)
        prompt = max(prompts.max_prompt_tokens for prompts in config.prompt_sections.values())
        if prompt + config.rollout.max_new_tokens > architecture.max_position_embeddings:
            raise ValueError(
                f"rollout.max_new_tokens: responses of {config.rollout.max_new_tokens} after prompts of up to {prompt} "
                f"tokens exceed the model's {architecture.max_position_embeddings} positions"
            )
    return architecture


def _known_architecture(config: RunConfig) -> Architecture | None:
    folder, warm_up = Path(config.model.path), config.model.warm_up
    if folder.exists():
        base_model.check_recipe(config.model, config.prompts)
        return read_architecture(folder)
    if warm_up is None:
        return None
    # A tokenizer that is yet to be made decides the vocabulary; everything else can be checked with a stand-in for it.
    return Architecture.from_config({"vocab_size": config.parallel.tp, **warm_up.architecture}, source="model.warm_up.architecture")


def check_model(config: RunConfig) -> None:
    """Raises ValueError when there is neither a model nor a recipe for one."""
    folder = Path(config.model.path)
    if not folder.exists() and config.model.warm_up is None:
        raise ValueError(f"model.path: {folder} does not exist and model.warm_up is null; expected a Hugging Face model folder")


def check_machine(config: RunConfig, capabilities: Capabilities) -> None:
    """Raises ValueError when this one machine cannot hold the servers and ranks it would start, or lacks what an option needs."""
    check_machine_options(config.megatron, capabilities)
    servers, tp = config.rollout.servers, config.rollout.tp
    if servers:
        default_server_python()
    if capabilities.device_type == "cpu":
        if servers and tp != 1:
            raise ValueError(f"rollout.tp: {tp}, expected 1 on a CPU")
        return
    needed = config.world_size + servers * tp
    if needed > capabilities.cuda_devices:
        raise ValueError(
            f"world_size: {config.world_size} ranks and {servers} servers of {tp} GPUs need {needed}, this machine has "
            f"{capabilities.cuda_devices}; expected fewer, or slurm/ for several machines"
        )


def check_prompts(config: RunConfig) -> None:
    """Read both prompt sources once. Raises ValueError naming file, row and field, or the limit that leaves no prompt."""
    with base_model.tokenizer_of(config.model) as tokenizer:
        load_prompts(tokenizer=tokenizer, **config.prompts.model_dump())
        if config.evaluation is not None:
            held_out_prompts(config.evaluation, tokenizer)


def examine_config(config: RunConfig) -> list[Finding]:
    """What a run needs of this machine: its files, and a run folder that can be written to (once there is one)."""
    lines = missing_paths(config)
    findings = [Finding(subject=line.partition(":")[0], verdict="missing", detail=line.partition(": ")[2]) for line in lines]
    return findings or [Finding(subject="run", verdict="ok", detail=f"{config.name}: its files are here")]


def missing_paths(config: RunConfig) -> list[str]:
    """`key: path` for every file or folder that the run needs and this machine does not have, or may not write to."""
    needed = [("model.path", config.model.path, config.model.warm_up is None)]
    needed += [
        (f"{section}.source", prompts.source, prompts.source.endswith((".jsonl", ".json", ".parquet")))
        for section, prompts in config.prompt_sections.items()
    ]
    keys = (("rollout.api_key_path", config.rollout.api_key_path), ("rollout.admin_key_path", config.rollout.admin_key_path))
    needed += [(name, path, True) for name, path in keys if path is not None]
    absent = [f"{name}: {path} does not exist" for name, path, required in needed if required and not Path(path).exists()]
    existing = next(folder for folder in (config.run_dir, *config.run_dir.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        absent.append(f"output_dir: {config.run_dir} cannot be written to")
    return absent


def problems(
    reports: Mapping[str, NodeReport | None], *, gpus_per_node: int, arrival_s: Mapping[str, float], roles: Mapping[str, str]
) -> dict[str, list[str]]:
    """What is wrong with each node; empty when nothing is.

    reports: by node, None for one that sent none in time. gpus_per_node: what each must have; 0 on machines without. arrival_s: when each
    report arrived, on one clock. roles: "trainer" or "server"; versions are compared among the nodes of a role, against what most have.
    """
    found: dict[str, list[str]] = {node: [] for node in reports}
    skews = {node: report.clock_s - arrival_s[node] for node, report in reports.items() if report is not None}
    usual_clock = statistics.median(skews.values()) if skews else 0.0
    for node, report in reports.items():
        if report is None:
            found[node].append("sent no report: unreachable, or its Python did not start (see its log)")
            continue
        found[node] += report.missing
        if report.gpus != gpus_per_node:
            found[node].append(f"{report.gpus} GPUs, expected {gpus_per_node}")
        if report.free_gib < MIN_FREE_GIB:
            found[node].append(f"{report.free_gib:.2f} GiB free for the run folder, expected at least {MIN_FREE_GIB:g}")
        if abs(skews[node] - usual_clock) > MAX_CLOCK_DIFFERENCE_S:
            found[node].append(f"its clock is {skews[node] - usual_clock:+.0f} s off the others'")
        present = [other for other in reports.values() if other is not None and roles[other.node] == roles[node]]
        found[node] += _odd_versions(report, present)
    return {node: lines for node, lines in found.items() if lines}


def _odd_versions(report: NodeReport, others: Sequence[NodeReport]) -> list[str]:
    lines = []
    for name, version in report.versions.items():
        counts = Counter(other.versions.get(name, "absent") for other in others)
        most = max(counts.values())
        usual = [value for value, count in counts.items() if count == most]
        if usual != [version]:  # a tie makes both suspicious
            rivals = ", ".join(value for value in usual if value != version)
            lines.append(f"{name} {version}, {'most nodes have' if most > 1 else 'another node has'} {rivals}")
    return lines

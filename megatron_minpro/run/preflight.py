"""Which checks a run passes before anything starts. `minpro train`, its dry run and a job's first step share them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from checkpoints_convert.hf_config import Architecture, read_architecture
from megatron_minpro.cluster import checks, paths
from megatron_minpro.config import RunConfig, dump_config
from megatron_minpro.data.rows import is_file, is_source_of_rows
from megatron_minpro.loop.stop_time import stop_warning
from megatron_minpro.run import base_model
from megatron_minpro.run.attempts import record_beginning
from megatron_minpro.run.plug_ins import check_plug_ins
from megatron_minpro.run.run_state import checkpoint_to_continue, read_state, refuse_unusable
from megatron_minpro.tracking.metrics_file import METRICS_FILE, read_metrics
from megatron_minpro.tracking.run_files import CONFIG_FILE, RESULT_FILE
from parallel.capabilities import Capabilities, detect


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What was found out.

    architecture: of the model; None where it is not on this machine.
    not_checked: one line for each thing that could not be looked at here.
    """

    architecture: Architecture | None
    not_checked: tuple[str, ...]


def check_start(config: RunConfig, *, resume: str, capabilities: Capabilities, machine: bool) -> None:
    """Everything that `minpro train` needs.

    Args:
        config: the run.
        resume: auto, never or must.
        capabilities: of this machine.
        machine: the whole run is on this machine. False for a job of several, whose nodes `minpro doctor` compares.

    Raises:
        ValueError: the first thing that is wrong, in one line.
    """
    checks.check_model(config)
    _check_here(config, resume=resume, capabilities=capabilities, machine=machine, read_hub=True)
    checks.check_endpoints(config)


def check_dry_run(config: RunConfig, *, resume: str, capabilities: Capabilities) -> Preflight:
    """What `minpro train --dry-run` finds out. A run whose model is not here is meant for another machine: then only what is here counts.

    Raises:
        ValueError: as check_start.
    """
    if Path(config.model.path).exists() or config.model.warm_up is not None:
        architecture = _check_here(config, resume=resume, capabilities=capabilities, machine=True, read_hub=False)
        not_checked = [
            f"{section}.source {prompts.source} is a Hugging Face data set, which is not read"
            for section, prompts in config.prompt_sections.items()
            if _is_hub(prompts.source)
        ]
    else:
        architecture = None
        not_checked = _check_elsewhere(config, resume=resume, capabilities=capabilities)
    if config.rollout.endpoints:
        not_checked.append("the servers at rollout.endpoints are not asked")
    return Preflight(architecture=architecture, not_checked=tuple(not_checked))


def check_job(config: RunConfig) -> None:
    """What `minpro train --dry-run --slurm` checks: the job runs on other machines, so it is the configuration alone.

    Raises:
        ValueError: as check_start.
    """
    checks.check_warm_up(config)
    check_plug_ins(config)
    checks.check_passed_options(config, device=detect().device_type)
    if Path(config.model.path).exists() or config.model.warm_up is not None:
        checks.check_architecture(config, _architecture(config))


def prepare(config: RunConfig, *, attempt: tuple[str, int] | None) -> Path:
    """A job's first step: check the run, write its configuration into the run folder, which is returned; nothing is started.

    Args:
        config: the run.
        attempt: the job and how often it was requeued, for RUN_DIR/attempts.jsonl; None where nobody will ask.

    Raises:
        ValueError: as check_start.
    """
    check_start(config, resume="auto", capabilities=detect(), machine=False)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / RESULT_FILE).unlink(missing_ok=True)  # of a run that is now prolonged
    write_atomically(config.run_dir / CONFIG_FILE, dump_config(config))
    if attempt is not None:
        job, number = attempt
        checkpoint = checkpoint_to_continue(config.run_dir / "checkpoints", config)
        record_beginning(config.run_dir, job=job, number=number, checkpoint=checkpoint)
    return config.run_dir


def measured_stop(config: RunConfig) -> str | None:
    """What to say when earlier attempts at the run show that a stop takes longer than the job gives it; None when all is well."""
    found = [stop_warning(line, allowed_s=config.checkpoint.stop_within_s) for line in read_metrics(config.run_dir / METRICS_FILE)]
    return next((warning for warning in reversed(found) if warning is not None), None)


def check_run_folder(config: RunConfig, *, resume: str) -> Path | None:
    """The checkpoint that the run continues from, None for a fresh run.

    Args:
        config: the run.
        resume: auto, never or must.

    Raises:
        ValueError: `resume` and the folder disagree, or it belongs to another configuration (the differences are named).
    """
    run_dir = config.run_dir
    checkpoint = checkpoint_to_continue(run_dir / "checkpoints", config)
    if resume == "never" and ((run_dir / CONFIG_FILE).exists() or checkpoint is not None):
        raise ValueError(f"{run_dir}: holds a run already; expected a new name=... with --resume never")
    if checkpoint is not None:
        refuse_unusable(checkpoint, config)
    if resume == "must" and checkpoint is None:
        raise ValueError(f"{run_dir}: has no checkpoint to resume from; expected one with --resume must")
    return checkpoint


def _check_here(config: RunConfig, *, resume: str, capabilities: Capabilities, machine: bool, read_hub: bool) -> Architecture:
    folder = Path(config.model.path)
    checks.check_prompt_files(config)  # before the base model, whose recipe names the prompts
    checks.check_warm_up(config)
    check_plug_ins(config)
    checks.check_key_files(config)
    paths.check_output_folder(config)
    checks.check_passed_options(config, device=capabilities.device_type)
    architecture = _architecture(config)
    checks.check_architecture(config, architecture)
    checkpoint = check_run_folder(config, resume=resume)
    dealt = None if checkpoint is None else read_state(checkpoint).cursor
    if folder.exists():
        checks.check_weights(folder, architecture)
    if machine:
        checks.check_machine(config, capabilities)
    with base_model.tokenizer_of(config.model) as tokenizer:
        if folder.exists():
            checks.check_tokenizer(tokenizer, vocab_size=architecture.vocab_size, source=str(folder))
            checks.check_end_tokens(config, folder, tokenizer)
        else:
            architecture = base_model.architecture_of(config.model, tokenizer)
            checks.check_architecture(config, architecture)
            base_model.check_examples(config.model, config.prompts, tokenizer)
        for section, prompts in config.prompt_sections.items():
            if read_hub or not _is_hub(prompts.source):
                checks.check_prompts(config, section, tokenizer, dealt=dealt)
    return architecture


def _check_elsewhere(config: RunConfig, *, resume: str, capabilities: Capabilities) -> list[str]:
    """Checks what is here of a run for another machine; a line for everything that is not."""
    check_plug_ins(config)
    paths.check_output_folder(config)
    checks.check_passed_options(config, device=capabilities.device_type)
    check_run_folder(config, resume=resume)
    not_checked = [
        f"model {config.model.path}: not on this machine, so its shape and the layout's fit are not checked, nor weights and tokenizer",
        "GPUs, ports and the server environment are not checked: the run is for another machine",
    ]
    for section, prompts in config.prompt_sections.items():
        if is_file(prompts.source) and Path(prompts.source).exists():
            checks.check_rows(config, section)
            not_checked.append(f"{section}.source {prompts.source}: the length of its prompts is not checked without the tokenizer")
        elif is_source_of_rows(prompts.source):
            not_checked.append(f"{section}.source {prompts.source} is not on this machine, so its rows are not checked")
    not_checked += [f"{name} {path} is not on this machine" for name, path in paths.key_files(config).items() if not Path(path).exists()]
    return not_checked


def _is_hub(source: str) -> bool:
    return is_source_of_rows(source) and not is_file(source)


def _architecture(config: RunConfig) -> Architecture:
    """Of the model folder, or of the model that is to be made with a stand-in for the size of its vocabulary."""
    folder, warm_up = Path(config.model.path), config.model.warm_up
    if folder.exists():
        base_model.check_recipe(config.model, config.prompts)
        return read_architecture(folder)
    assert warm_up is not None
    return Architecture.from_config({"vocab_size": config.parallel.tp, **warm_up.architecture}, source="model.warm_up.architecture")

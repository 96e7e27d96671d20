"""What `minpro train --dry-run` shows."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from checkpoints_convert.hf_config import Architecture
from megatron_minpro.config import RunConfig, dump_config
from megatron_minpro.run.preflight import check_dry_run
from megatron_minpro.run.ranks import are_forked
from megatron_minpro.run.run_folder import EXPORT_FOLDER
from parallel.capabilities import detect


def describe(config: RunConfig, *, resume: str) -> RenderableType:
    """Check everything that is on this machine, and show what would start.

    Args:
        config: the run.
        resume: auto, never or must.

    Returns:
        The resolved configuration, every rank's place, the processes, and what was not checked.

    Raises:
        ValueError: `minpro train` would refuse the configuration.
    """
    capabilities = detect()
    found = check_dry_run(config, resume=resume, capabilities=capabilities)
    layout = config.layout
    ranks = Table(title=f"{layout.world_size} trainer ranks", title_justify="left")
    for name in ("rank", "tp", "cp", "dp", "pp", "etp", "ep", "edp"):
        ranks.add_column(name, justify="right")
    shown = [*range(min(layout.world_size, 16))]
    for rank in shown:
        place = layout.coordinates(rank)
        ranks.add_row(*(str(getattr(place, name)) for name in ("rank", "tp", "cp", "dp", "pp", "etp", "ep", "edp")))
    if layout.world_size > len(shown):
        ranks.add_row("...", *[""] * 7)
    processes = Table(title="processes", title_justify="left", show_header=False)
    started = "fork of" if are_forked(config, capabilities) else "torchrun -m"
    processes.add_row(f"{config.world_size} x", f"{started} megatron_minpro.run.rank {config.run_dir} train")
    if config.rollout.servers:
        processes.add_row(
            f"{config.rollout.servers} x", f"SGLang server of {config.model.path}, tp {config.rollout.tp}, {config.rollout.dtype}"
        )
    for endpoint in config.rollout.endpoints:
        processes.add_row("1 x", f"SGLang server at {endpoint} (started elsewhere)")
    steps = config.num_global_steps
    facts = [
        *capabilities.lines(),
        *_describe_model(config, found.architecture),
        f"{steps} global steps x {config.actor.updates_per_step} updates of {config.sequences_per_mini_batch} responses; "
        f"{config.rollout.prompts_per_step} prompts x {config.rollout.group_size} responses a step; "
        f"staleness {config.staleness}: policy lag {config.actor.updates_per_step * config.staleness} to "
        f"{config.actor.updates_per_step * (config.staleness + 1) - 1} updates",
        f"run folder {config.run_dir}; the policy would be exported to {config.run_dir / EXPORT_FOLDER}",
        *(f"not checked: {line}" for line in found.not_checked),
    ]
    return Group(Syntax(dump_config(config), "yaml", background_color="default"), ranks, processes, *(Text(fact) for fact in facts))


def _describe_model(config: RunConfig, architecture: Architecture | None) -> list[str]:
    """One line about the model, where it is known."""
    if architecture is None:
        return []
    folder = Path(config.model.path)
    experts = f"{architecture.num_experts} experts" if architecture.num_experts else "dense"
    made = "" if folder.exists() or config.model.warm_up is None else f", to be made in {config.model.warm_up.num_steps} supervised steps"
    return [f"model {folder}: {architecture.num_hidden_layers} layers of {architecture.hidden_size}, {experts}{made}"]

"""Weights & Biases: the numbers of metrics.jsonl as a wandb run, with histograms and a few responses.

Needs the extra: pip install 'megatron-minpro[wandb]'.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_minpro.tracking.response_text import html_text
from megatron_minpro.tracking.step_details import StepDetails

WANDB_FOLDER = "wandb"
ID_FILE = "run_id"  # in WANDB_FOLDER; a resumed attempt continues the same wandb run


class Wandb:
    """The tracker `wandb`."""

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str = "minpro",
        mode: Literal["online", "offline"] = "online",
        entity: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        """
        Args:
            run_dir: the run folder. wandb writes into its folder `wandb`.
            project: wandb project.
            mode: offline writes files alone; `wandb sync RUN_DIR/wandb/offline-run-*` uploads them later.
            entity: wandb user or team; null is the account's default.
            tags: of the wandb run.

        Raises:
            ValueError: wandb is not installed, or the mode is unknown.
        """
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"wandb cannot be imported ({error}); expected pip install 'megatron-minpro[wandb]'") from error
        if mode not in ("online", "offline"):
            raise ValueError(f"mode = {mode!r}: expected online or offline")
        self._wandb = wandb
        self._run_dir = run_dir
        self._options: dict[str, Any] = {"project": project, "mode": mode, "entity": entity, "tags": list(tags)}
        self._run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin the wandb run, or continue the one of an earlier attempt."""
        folder = self._run_dir / WANDB_FOLDER
        folder.mkdir(exist_ok=True)
        id_file = folder / ID_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = self._wandb.init(
            dir=str(self._run_dir),
            name=config.get("name"),
            config=dict(config),
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow" if self._options["mode"] == "online" else None,
            settings=self._wandb.Settings(console="off", silent=True),
            **self._options,
        )
        # A step of our own as the axis: a resumed attempt logs again the steps after its checkpoint.
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row of the wandb run."""
        self._run.log({"global_step": step, **metrics})

    def log_details(self, step: int, details: StepDetails) -> None:
        """A second row of the same global step: the histograms under their names, the responses as response/0, response/1, ..."""
        row: dict[str, Any] = {}
        for name, histogram in details.filled_histograms().items():
            bounds, counts = histogram.filled()
            row[name] = self._wandb.Histogram(np_histogram=(np.array(counts), np.array(bounds)))
        for number, response in enumerate(details.responses):
            # A table would be an artifact, outside the run folder.
            row[f"response/{number}"] = self._wandb.Html(html_text(response), inject=False)
        self._run.log({"global_step": step, **row})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Keep the summary and end the wandb run."""
        self._run.summary.update(dict(summary))
        self._run.finish()

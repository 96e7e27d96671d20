"""Global steps of TRL's GRPOTrainer on the CPU, in TRL's own environment: against_trl.py starts this file there.

python trl_process.py JOB RESULT: JOB is a JSON file with the fields of `main`; RESULT gets a JSON list with a dict for each global step.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

_LAST_STEP = re.compile(r"= ([0-9]+) ;")


class TimedTrainer(GRPOTrainer):
    """Adds what each global step took: seconds of generation, of the rest of its preparation, and of the optimizer steps."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.steps: list[dict[str, float]] = []
        self._began: tuple[float, float] | None = None
        self._generate_s = self._prepare_s = 0.0
        self._sampled: dict[str, float] = {}

    def _generate(self, prompts: list[Any]) -> Any:
        began = time.perf_counter()
        generated = super()._generate(prompts)
        self._generate_s = time.perf_counter() - began
        return generated

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.end_step()
        self._began = time.perf_counter(), time.process_time()
        prepared = super()._generate_and_score_completions(inputs)
        self._prepare_s = time.perf_counter() - self._began[0]
        metrics = self._metrics["train"]
        self._sampled = {"response_tokens": metrics["completions/mean_length"][-1], "reward": metrics["reward"][-1]}
        return prepared

    def end_step(self) -> None:
        """A global step lasts from the beginning of its generation to the beginning of the next."""
        if self._began is None:
            return
        step_s, cpu_s = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        self.steps.append(
            {
                "step": step_s,
                "cpu": cpu_s,
                "generate": self._generate_s,
                "score": self._prepare_s - self._generate_s,
                "update": step_s - self._prepare_s,
                **self._sampled,
            }
        )
        self._began = None


def main(
    *,
    model: str,
    prompts: list[dict[str, Any]],
    steps: int,
    prompts_per_step: int,
    group_size: int,
    updates_per_step: int,
    max_new_tokens: int,
    learning_rate: float,
    threads: int,
    folder: str,
) -> list[dict[str, float]]:
    """Train and say what each global step took.

    prompts: text, token_ids, answer of at least steps x prompts_per_step prompts. folder: for what TRL writes.
    """
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [[{"role": "user", "content": prompt["text"]}] for prompt in prompts]
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    if token_ids != [prompt["token_ids"] for prompt in prompts]:
        raise ValueError("the prompts have other tokens here")

    def final_step(completions: list[Any], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        """1 for the right last step and an end of its own, as megatron_minpro.tasks.arithmetic_chains.reward."""
        last = [_LAST_STEP.fullmatch(" ".join(turns[0]["content"].split()[-3:])) for turns in completions]
        ended = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
        return [float(end and found is not None and found[1] == right) for found, end, right in zip(last, ended, answer, strict=True)]

    trainer = TimedTrainer(
        model=model,
        reward_funcs=final_step,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(
            [{"prompt": turns, "answer": prompt["answer"]} for turns, prompt in zip(messages, prompts, strict=True)]
        ),
        args=GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            model_init_kwargs={"dtype": "float32"},
            gradient_checkpointing=False,  # nor is anything recomputed on the other side
            per_device_train_batch_size=prompts_per_step * group_size // updates_per_step,
            steps_per_generation=updates_per_step,
            max_steps=steps * updates_per_step,
            num_generations=group_size,
            max_completion_length=max_new_tokens,
            temperature=1.0,
            beta=0.0,
            epsilon=0.2,
            epsilon_high=0.28,
            router_aux_loss_coef=0.0,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=1.0,
            save_strategy="no",
            logging_steps=10_000,
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
    )
    trainer.train()
    trainer.end_step()
    return trainer.steps


if __name__ == "__main__":
    job, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(main(**json.loads(job.read_text()))))

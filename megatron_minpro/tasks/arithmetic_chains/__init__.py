"""A small verifiable task that a model of 100k parameters learns within minutes. Nothing outside this folder knows of it.

A configuration names its parts by import path (see configs/tiny_moe_cpu.yaml):
    prompts.source            megatron_minpro.tasks.arithmetic_chains.prompts:ArithmeticChains
    reward.name               megatron_minpro.tasks.arithmetic_chains.reward:final_step
    model.warm_up.tokenizer   megatron_minpro.tasks.arithmetic_chains.tokenizer:build_tokenizer
    model.warm_up.examples    megatron_minpro.tasks.arithmetic_chains.worked_examples:noisy_solutions
"""

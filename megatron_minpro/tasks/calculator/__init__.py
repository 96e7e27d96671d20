"""Chains of arithmetic that the model may solve by calling a calculator: an example of a conversation with a tool.

The model writes each step of a chain either by itself, `7 * 2 = 4 ;`, or it asks, `7 * 2 :`, and the calculator goes on with `= 4 ;`. It
starts from worked examples in which its own results are often wrong, so it learns to ask. Everything here reaches the program through
settings that name a function: prompts and tokenizer are those of arithmetic_chains. See configs/tiny_calculator_cpu.yaml.
"""

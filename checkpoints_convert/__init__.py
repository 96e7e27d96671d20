"""Hugging Face <-> Megatron checkpoints: one table of tensors, streaming readers and writers. Needs torch and safetensors only."""

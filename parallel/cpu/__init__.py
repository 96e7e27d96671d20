"""What exists only to run Megatron-Core's CUDA code on a CPU with gloo."""

"""Off-policy reinforcement learning for Mixture-of-Experts language models: objectives, the training loop and the `minpro` command."""

__version__ = "0.1.0"

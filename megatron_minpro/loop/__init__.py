"""The training loop: sample, score, update, publish."""

"""One run as processes and files: launcher, trainer ranks, run folder, run state, checkpoints."""

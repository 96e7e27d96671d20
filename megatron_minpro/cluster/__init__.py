"""Facts about the nodes of a job, the checks before it starts, and what Slurm needs to know."""

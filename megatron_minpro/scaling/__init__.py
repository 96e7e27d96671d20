"""How a model's training scales with expert parallelism: predicted and measured rows, their table, plots and report."""

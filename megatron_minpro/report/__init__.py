"""What runs achieved: measures, comparisons, summary.json, pictures, pass@k. From a run folder or numbers; nothing here runs a model."""

"""What a finished run shows: plots, summary.json, one paragraph."""

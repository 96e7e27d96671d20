"""What a run achieved: summary.json, pictures, pass@k. Pure functions of numbers; run/finished.py reads a run folder for them."""

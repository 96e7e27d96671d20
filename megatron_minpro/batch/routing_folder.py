"""Where the files of routing_file.py lie. Ranks read it before they may import torch."""

ROUTING_FOLDER = "routing"  # in the run folder, and in a checkpoint

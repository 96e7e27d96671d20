"""Where files lie that go with a batch (batch_file.py). Ranks read it before they may import torch."""

# In the run folder, and in a checkpoint.
ROUTING_FOLDER = "routing"
TOP_TOKENS_FOLDER = "top_tokens"
BATCH_FOLDERS = (ROUTING_FOLDER, TOP_TOKENS_FOLDER)

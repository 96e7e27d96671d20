"""A sampled response and the batch it travels in: records, the staleness buffer, the way to all ranks and to disk."""

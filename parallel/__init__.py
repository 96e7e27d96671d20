"""How one model and one batch are spread over ranks: shards, scans, vocab-parallel log-probabilities, layouts and the actor."""

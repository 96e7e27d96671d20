"""One HTML file that shows runs: curves, where the time went, how far off-policy, single tokens. Needs no network and no server."""

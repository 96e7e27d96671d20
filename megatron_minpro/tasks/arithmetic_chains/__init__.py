"""Chains of modular arithmetic: a verifiable task that a model of 100k parameters learns within minutes."""

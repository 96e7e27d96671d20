"""Prompts: where they come from, and a cursor that deals them out and can be saved."""

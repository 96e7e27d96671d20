"""The sampling process: whatever happens between a prompt and a finished batch, outside of rank 0's interpreter. See README.md here."""

"""What happens between a prompt and its reward: one answer of the model, or a user's coroutine that asks it several times."""

"""How a response is judged: math-verify in worker processes, exact answers, a user's function."""

"""Where tokens come from: SGLang servers, a client for them, and versioned weights into them."""

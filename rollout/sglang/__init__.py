"""SGLang: the start command, requests, control endpoints."""

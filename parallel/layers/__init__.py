"""The layers of a rank where TransformerEngine is absent, and the router."""

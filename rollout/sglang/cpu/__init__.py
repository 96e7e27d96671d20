"""SGLang's own server on a machine without a GPU."""

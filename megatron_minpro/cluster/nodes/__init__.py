"""All nodes of a job look at themselves and at each other, and try what the run will do, before it starts."""

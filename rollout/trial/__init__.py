"""A trial of what a run will do: every rank and server GPU computes, adds up, and receives a broadcast, before the run starts."""

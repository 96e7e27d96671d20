"""What a run writes while it goes: metrics, rollouts, a heartbeat, and the console that reads them."""

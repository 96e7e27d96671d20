"""The subcommands of `minpro`: each turns options into a record and calls the room that does the work."""

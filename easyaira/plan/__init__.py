"""Cost of a run, estimated without running it."""

"""A run, from its configuration to its released folder."""

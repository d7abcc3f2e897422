"""A run, from configuration to released folder."""

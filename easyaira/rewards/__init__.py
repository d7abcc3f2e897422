"""Rewards of generated texts."""

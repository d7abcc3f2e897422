"""Shared by tests: tiny models and data, runs on them, child processes."""

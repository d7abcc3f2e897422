"""Configurations of other trainers as ours: a table of keys for each, and computed options."""

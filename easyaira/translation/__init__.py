"""Configurations of other trainers as ours: a table of keys for each, and the sums between them."""

"""The measurements of scripts/benchmark.py, one file for each kind."""

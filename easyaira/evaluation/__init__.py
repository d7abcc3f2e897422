"""Evaluation: benchmarks by lm-evaluation-harness, pairs and labels by scorers, results."""

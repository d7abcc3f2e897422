"""Checkpoints and pretrained models."""

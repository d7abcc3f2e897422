"""Architectures: one file each, and the registry that finds them by Hugging Face's `model_type`."""

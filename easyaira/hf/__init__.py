"""Hugging Face files: weight tables, safetensors, conversion."""

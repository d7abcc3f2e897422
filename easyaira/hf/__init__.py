"""Hugging Face's files: tables of names, safetensors, conversion."""

"""Adapters (LoRA): parameters, the frozen base, and PEFT's format."""

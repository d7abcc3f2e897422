"""Options with their defaults and help texts. Nothing here imports jax."""

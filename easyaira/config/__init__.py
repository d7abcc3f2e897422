"""Options, with their defaults and meanings. Nothing here imports jax."""

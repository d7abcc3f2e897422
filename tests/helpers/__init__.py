"""What tests share: tiny models and data, runs on them, other processes."""

"""Instruction backtranslation: Li et al. (2023), Self-Alignment with Instruction Backtranslation,
arXiv 2308.06259."""

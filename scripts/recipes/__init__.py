"""Starts to copy: one file for each way to train, shown in docs/recipes.md."""

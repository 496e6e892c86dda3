"""Checkpoints that appear whole, load at any number of ranks, and export to transformers."""

"""Losses as sums over targets, so that they add up over micro-batches and ranks."""

"""Kernel slots and their backends; nothing here knows a model."""

"""Thin adapters over optional packages, each imported only when its backend is resolved."""

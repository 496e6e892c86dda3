"""The Lightning strategy that builds the mesh and saves across it."""

from omnilit.strategies.omni import OmniStrategy

__all__ = ["OmniStrategy"]

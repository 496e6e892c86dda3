"""Train any Hugging Face model, on a laptop CPU or a cluster, from one YAML file."""

from omnilit.torchvision_import import install_finder

__all__ = ["__version__"]

__version__ = "0.1.0"

install_finder()  # see there why here

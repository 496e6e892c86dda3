"""Train any Hugging Face model, on a laptop CPU or a cluster, from one YAML file."""

__all__ = ["__version__"]

__version__ = "0.1.0"

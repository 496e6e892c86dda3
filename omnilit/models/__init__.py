"""Models of transformers: built on meta, filled with weights, bound to kernels."""

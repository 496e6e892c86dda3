"""Our own Triton kernels; each module is imported when a model is bound to what it holds."""

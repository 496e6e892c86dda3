"""The verbs beside `fit` and `validate`, one module each with `run(argv) -> int`."""

__all__: list[str] = []

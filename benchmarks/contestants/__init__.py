"""Trainers that do the same fine-tune, each run as a process of its own by `train_speed`."""

import omnilit  # noqa: F401 - beside a CPU build of torch, PyPI's torchvision imports with it alone

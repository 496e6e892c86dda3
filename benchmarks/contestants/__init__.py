"""Trainers that do the same fine-tune, each run as a process of its own by `train_speed`."""

"""A run as a frozen dataclass: its fields, what they mean, what they refuse, and their file."""

from freeadv_fast.config.run import TrainConfig

__all__ = ["TrainConfig"]

"""Smaller copies of an image folder: python -m freeadv_fast.data.resize."""

from freeadv_fast.data.resize.copies import resize_folder

__all__ = ["resize_folder"]

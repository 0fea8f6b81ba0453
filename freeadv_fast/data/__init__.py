"""Every kind of data as one `Loader`: from bytes on disk to uint8 minibatches on the device."""

from freeadv_fast.data.build import (
    Loaders,
    build_folder_loader,
    build_loaders,
    build_phase_loaders,
    build_val_loader,
)
from freeadv_fast.data.loader import Batch, Loader

__all__ = [
    "Batch",
    "Loader",
    "Loaders",
    "build_folder_loader",
    "build_loaders",
    "build_phase_loaders",
    "build_val_loader",
]

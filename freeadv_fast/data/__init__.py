"""Every kind of data as one `Loader`: from bytes on disk to uint8 minibatches on the device.

Each name is imported when it is first used: what only reads files, as the processes of `resize`
do, needs no torch.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from freeadv_fast.data.build import Loaders as Loaders
    from freeadv_fast.data.build import build_folder_loader as build_folder_loader
    from freeadv_fast.data.build import build_loaders as build_loaders
    from freeadv_fast.data.build import build_phase_loaders as build_phase_loaders
    from freeadv_fast.data.build import build_val_loader as build_val_loader
    from freeadv_fast.data.loader import Batch as Batch
    from freeadv_fast.data.loader import Loader as Loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "build": [
            "Loaders",
            "build_folder_loader",
            "build_loaders",
            "build_phase_loaders",
            "build_val_loader",
        ],
        "loader": ["Batch", "Loader"],
    },
)

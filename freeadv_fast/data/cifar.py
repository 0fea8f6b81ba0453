"""CIFAR-10 and CIFAR-100 from the official python files, whole on the device.

Learning Multiple Layers of Features from Tiny Images, Krizhevsky 2009.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from freeadv_fast.data.resident import ResidentImages
from freeadv_fast.errors import UserError

IMAGE_SIZE = 32

# What pickled arrays name of numpy; `_frombuffer` in protocol 5.
ARRAY_NAMES = frozenset({"_reconstruct", "_frombuffer", "ndarray", "dtype", "scalar"})


@dataclasses.dataclass(frozen=True)
class CifarFiles:
    """How one of the two sets is laid out.

    Attributes:
        folder: Name of the folder in the official archive.
        train: File names with their official md5.
        val: Likewise.
        meta: File with the class names, and its md5.
        label_key: Where the files hold the labels.
        class_key: Where `meta` holds the class names.
    """

    folder: str
    train: dict[str, str]
    val: dict[str, str]
    meta: tuple[str, str]
    label_key: bytes
    class_key: bytes


def _files_of(dataset: type[CIFAR10], label_key: bytes) -> CifarFiles:
    """The layout and checksums that torchvision knows."""
    return CifarFiles(
        folder=dataset.base_folder,
        train={name: md5 for name, md5 in dataset.train_list},
        val={name: md5 for name, md5 in dataset.test_list},
        meta=(dataset.meta["filename"], dataset.meta["md5"]),
        label_key=label_key,
        class_key=dataset.meta["key"].encode(),
    )


CIFAR = {
    "cifar10": _files_of(CIFAR10, b"labels"),
    "cifar100": _files_of(CIFAR100, b"fine_labels"),
}


def load_cifar(
    name: str,
    folder: str,
    split: Literal["train", "val"],
    device: torch.device,
    announce: Callable[[str], None],
) -> ResidentImages:
    """Reads a split to the device.

    Args:
        name: ``cifar10`` or ``cifar100``.
        folder: The folder of the official files, or the one that holds it.
        split: ``train`` (50,000 images) or ``val`` (10,000).
        device: Where the images go.
        announce: Called with a line for the user when the files are not the official ones.

    Raises:
        UserError: a file is missing or damaged.
    """
    files = CIFAR[name]
    place = _locate(name, folder, files)
    parts: list[dict[bytes, Any]] = []
    is_official = True
    wanted = files.train if split == "train" else files.val
    for file, md5 in (*wanted.items(), files.meta):
        content = _read(name, os.path.join(place, file))
        parts.append(_unpickle(name, os.path.join(place, file), content))
        is_official &= hashlib.md5(content, usedforsecurity=False).hexdigest() == md5
    if not is_official:
        announce(f"{name}: the files in {place} are not the official ones (md5 differs)")
    try:
        *batches, meta = parts
        classes = [value.decode() for value in meta[files.class_key]]
        data = np.concatenate([batch[b"data"] for batch in batches])
        labels = np.concatenate([np.array(batch[files.label_key]) for batch in batches])
        images = torch.from_numpy(data.reshape(len(labels), 3, IMAGE_SIZE, IMAGE_SIZE))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--data {name}:{folder}: not {name}'s python files ({error})") from None
    images = images.to(device).permute(0, 2, 3, 1).contiguous()
    return ResidentImages(images, labels.astype(np.int64), classes)


def _locate(name: str, folder: str, files: CifarFiles) -> str:
    """The folder of the files themselves."""
    for place in (folder, os.path.join(folder, files.folder)):
        if os.path.isfile(os.path.join(place, files.meta[0])):
            return place
    raise UserError(
        f"--data {name}:{folder}: neither this folder nor {files.folder}/ in it holds the "
        f"official python files ({', '.join([*files.train, *files.val, files.meta[0]])})"
    )


def _read(name: str, path: str) -> bytes:
    """The bytes of a file."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"--data {name}: {path} cannot be read ({error.strerror})") from None


class ArrayUnpickler(pickle.Unpickler):
    """Reads dictionaries of arrays, and runs nothing else that a pickle may hold."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that numpy's arrays are rebuilt from."""
        root = module.split(".")[0]
        if root == "numpy" and name in ARRAY_NAMES:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"holds {module}.{name}, not only arrays")


def _unpickle(name: str, path: str, content: bytes) -> dict[bytes, Any]:
    """The dictionary in an official file, keys as bytes."""
    try:
        value = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        return {key: value[key] for key in value}
    except Exception as error:  # a damaged pickle raises nearly anything
        words = str(error) or type(error).__name__
        raise UserError(f"--data {name}: {path} is damaged ({words})") from None

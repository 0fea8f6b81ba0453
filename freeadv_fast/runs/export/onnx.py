"""ONNX: the network with its normaliser as one file for runtimes that know no PyTorch.

torch's exporter (``dynamo=True``; it needs onnx and onnxscript) captures the plain network: fused
layers and space-to-depth stems belong to training and are not in it. What onnxruntime makes of the
file is compared with torch before the file gets its name.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freeadv_fast.errors import UserError
from freeadv_fast.runs.export.network import ONNX
from freeadv_fast.runs.foreign import printable
from freeadv_fast.runs.whole_file import renamed_when_whole

# Of logits, relative to the largest where that is above 1: sums in another order, not another
# network. PreActResNet-18, a ViT and an EfficientNet differ by 1e-7 to 1e-6.
TOLERANCE = 1e-4
# Two sizes, neither of them the one that was traced: the batch is free.
COMPARED_BATCHES = (1, 3)
TRACED_BATCH = 2


def export_onnx(network: nn.Module, folder: Path, image_size: int) -> Path:
    """Writes ``model.onnx``: ``pixels`` (batch, 3, H, W) in [0, 1] to ``logits`` (batch, classes).

    Args:
        network: Takes pixels, in eval mode, on the CPU; such as `load_export` returns.
        folder: An export's.
        image_size: H and W, which are fixed; the batch is not.

    Returns:
        The file, whole and compared with torch.

    Raises:
        UserError: a package is missing, torch cannot export the network, or onnxruntime disagrees
            with torch by more than `TOLERANCE`; no file is written then.
    """
    require_packages()
    path = folder / ONNX
    with renamed_when_whole(path) as partial:
        _trace(network, partial, image_size)
        difference = disagreement(network, partial, image_size)
        if not difference <= TOLERANCE:  # NaN is no agreement either
            raise UserError(
                f"--onnx: onnxruntime's logits differ from torch's by {difference:.1e} (at most "
                f"{TOLERANCE:.0e}); nothing was written"
            )
    return path


def require_packages() -> None:
    """Refuses to begin without what it takes.

    Raises:
        UserError: names the package and the command that installs it.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(
                f"--onnx: {name} is not installed; pip install 'freeadv-fast[onnx]'"
            ) from None


def _trace(network: nn.Module, path: Path, image_size: int) -> None:
    """Lets torch write the file."""
    pixels = torch.rand(TRACED_BATCH, 3, image_size, image_size)
    try:
        with _quiet():
            torch.onnx.export(
                network,
                (pixels,),
                path,
                dynamo=True,
                input_names=["pixels"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
            )
    except Exception as error:  # the exporter's own, and whatever an operator's translation raises
        cause = error.__cause__ or error
        reason = printable(str(cause) or type(cause).__name__)
        raise UserError(f"--onnx: torch cannot export this network ({reason})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress, its warnings, and its report on what it could not do."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def disagreement(network: nn.Module, path: Path, image_size: int) -> float:
    """The largest difference between onnxruntime's logits and torch's, on images of noise.

    Args:
        network: As `export_onnx`'s.
        path: An ONNX file.
        image_size: Side of the images, in pixels.

    Returns:
        Relative to torch's largest logit where that is above 1; infinite where the file's logits
        have another shape.
    """
    session = _session(path)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in COMPARED_BATCHES:
        pixels = torch.rand(batch, 3, image_size, image_size, generator=generator)
        with torch.no_grad():
            expected = network(pixels)
        logits = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
        if logits.shape != expected.shape:
            return float("inf")
        difference = (logits - expected).abs().max() / expected.abs().max().clamp_min(1)
        worst = max(worst, difference.item())
        if difference.isnan():
            return float("nan")
    return worst


def _session(path: Path) -> Any:
    """onnxruntime with the file loaded, on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

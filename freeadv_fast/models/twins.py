"""Modules that stand for others: another class, the same tensors, children and hooks."""

from __future__ import annotations

from typing import Any

from torch import nn


def class_path(module: nn.Module) -> str:
    """The full name of a module's class: known without importing the library that defines it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def twin_of(module: nn.Module, twin_class: type[nn.Module]) -> Any:
    """An object of another class with the same attributes: tensors, children and hooks are shared.

    Args:
        module: Stays as it is.
        twin_class: A class that adds no attributes to those of `module`, or whose own are set by
            the caller.
    """
    twin = twin_class.__new__(twin_class)
    twin.__dict__.update(module.__dict__)
    return twin


def is_stock(module: nn.Module | None, *classes: type[nn.Module]) -> bool:
    """Whether a module is of one of these classes, not of a subclass, and nothing hooks it."""
    return type(module) in classes and not any(
        module.__dict__.get(name)  # type: ignore[union-attr]
        for name in (
            "forward",
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    )

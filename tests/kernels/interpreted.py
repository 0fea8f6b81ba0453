"""Where compiled kernels run: on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter.

Triton 3.6's interpreter spends half of its time on what no kernel asks for. Here it does not.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")


def replace_language_once() -> None:
    """Its language is replaced by interpreted functions for good.

    Triton does so at every launch, and again at every call of a device function.
    """
    from triton import language
    from triton.runtime import interpreter

    # For a function that sees both modules of the language.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    # So that kernels count to bounds known at run time. Triton's own, int(array), is an error of
    # NumPy 2.4 for arrays of one dimension.
    language.tensor.__index__ = lambda self: self.handle.data.item()


def make_types_when_read() -> None:
    """A tuple's type is made when it is read, NumPy's for a number once.

    Every shape is a tuple, and nobody reads the types of these.
    """
    from triton.language import core
    from triton.runtime import interpreter

    core.tuple.__init__ = lambda self, args, type=None: vars(self).update(values=[*args], kind=type)
    core.tuple.type = property(lambda self: self.kind or core._type_for_tuple_values(self.values))
    make, made = interpreter._get_np_dtype, {}

    def numpy_dtype(kind):
        name = kind.scalar.name
        if name not in made:
            made[name] = make(kind.scalar)
        return made[name]

    interpreter._get_np_dtype = numpy_dtype


if IS_INTERPRETED:
    replace_language_once()
    make_types_when_read()

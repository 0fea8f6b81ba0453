"""Triton kernels, one op a file; installed as `freeadv_fast.kernels`."""

# With the repository's root on sys.path this folder is also importable as `kernels`. That second
# copy would register every custom op twice, silently.
if __name__ == "kernels":
    raise ImportError(
        "this folder is not a package of its own; after `pip install --no-build-isolation -e .`, "
        "import freeadv_fast.kernels"
    )

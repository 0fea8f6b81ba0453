"""What people type, and what they read back: flags, help, one line for every mistake."""

from freeadv_fast.cli.run import run_tool, run_training

__all__ = ["run_tool", "run_training"]

"""What only a GPU runs, as far as a CPU can tell."""

import importlib

import torch


def test_the_peak_memory_of_a_fresh_process_can_be_reset(repository, monkeypatch):
    """Before CUDA is initialised torch's allocator knows no device, and the reset raises."""
    monkeypatch.syspath_prepend(str(repository / "bench"))
    harness, calls = importlib.import_module("harness"), []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: calls.append("reset"))
    harness.MemoryMeter(torch.device("cuda"))
    assert calls == ["init", "reset"]

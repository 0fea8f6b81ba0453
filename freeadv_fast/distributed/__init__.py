"""Processes and what they exchange: torchrun's ranks, and images that change places."""

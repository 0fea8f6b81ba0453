"""Checks that broken defences fail: whether a robust accuracy can be believed."""

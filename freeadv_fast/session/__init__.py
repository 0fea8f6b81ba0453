"""What surrounds the training loop: what a run needs before it, beside it and after it."""

"""freeadv_fast: adversarial training of image classifiers at the cost of natural training."""

__version__ = "0.1.0"

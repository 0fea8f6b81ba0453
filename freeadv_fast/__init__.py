"""Adversarial training of image classifiers at the cost of training ordinary ones.

    import freeadv_fast as ff

    result = ff.train(ff.TrainConfig(data="digits", arch="resnet18", image_size=32, eps="16/255"))
    result.model, result.clean_accuracy, result.robust_accuracy

`train`, `evaluate`, `TrainConfig`, `RECIPES`, `load_run` and `load_export` are the front door; each
is imported when it is first used, so that this import costs milliseconds and no torch.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from freeadv_fast.config.run import TrainConfig as TrainConfig
    from freeadv_fast.evaluation.subject import evaluate as evaluate
    from freeadv_fast.recipes.catalogue import RECIPES as RECIPES
    from freeadv_fast.runs.export.network import load_export as load_export
    from freeadv_fast.runs.saved import load_run as load_run
    from freeadv_fast.training import train as train

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config.run": ["TrainConfig"],
        "evaluation.subject": ["evaluate"],
        "recipes.catalogue": ["RECIPES"],
        "runs.export.network": ["load_export"],
        "runs.saved": ["load_run"],
        "training": ["train"],
    },
)

"""Every recipe is the run that it was at commit c972e9f, before the modules became packages."""

import hashlib
import json

from freeadv_fast.config.file import config_to_dict
from freeadv_fast.recipes.catalogue import RECIPES


def digest(config, fields):
    """Of the fields that configs had then, as JSON."""
    plain = {name: value for name, value in config_to_dict(config).items() if name in fields}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def test_recipes_dump_the_same(repository):
    before = json.loads((repository / "tests" / "fixtures" / "recipes.json").read_text())
    now = {name: digest(RECIPES[name], before["fields"]) for name in before["sha256"]}
    assert len(now) == 335
    assert now == before["sha256"]

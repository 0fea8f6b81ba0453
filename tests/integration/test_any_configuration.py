"""Any configuration trains two minibatches or is refused in one line: no traceback, no hang.

bench/configurations.py tries a thousand; this is its short form.
"""

import dataclasses

import pytest

from any_configuration import FIXED, try_configurations, usual
from freeadv_fast.config.fields import RunFields
from freeadv_fast.config.read import field_types

NUM_CONFIGURATIONS = 40


@pytest.mark.slow
def test_trains_or_is_refused_in_one_line(small_images, tmp_path):
    trained, refused = try_configurations(NUM_CONFIGURATIONS, small_images, tmp_path)
    # Both happen: a generator that is always refused tests nothing.
    assert len(trained) >= NUM_CONFIGURATIONS // 4
    assert len(refused) >= NUM_CONFIGURATIONS // 20


def test_every_field_is_drawn_or_fixed():
    hints = field_types()
    for name in hints.keys() - FIXED:
        assert usual(name, hints[name]) is not None
    assert {field.name for field in dataclasses.fields(RunFields)} == hints.keys()
    assert FIXED < hints.keys()

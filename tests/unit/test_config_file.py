"""What a config.yaml that somebody edited may hold."""

import pytest

from freeadv_fast.config.file import config_from_dict, config_to_dict
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError


@pytest.mark.parametrize(
    ("field", "value"),
    [("augment", "nonesuch"), ("decay", "foo"), ("attack_start", "foo"), ("precision", "fp8"),
     ("normalization", "foo"), ("on_collapse", "foo"), ("graphs", "yes")],
)  # fmt: skip
def test_a_choice_that_there_is_not_is_refused(field, value):
    plain = config_to_dict(TrainConfig()) | {field: value}
    flag = "--" + field.replace("_", "-")
    with pytest.raises(UserError, match=rf"^{flag} {value}: choose one of .*, "):
        config_from_dict(plain, "--config x")


@pytest.mark.parametrize(("value", "meaning"), [(False, "off"), (True, "on")])
def test_on_and_off_need_no_quotes(value, meaning):
    """YAML reads them as booleans; the run that wrote `graphs: off` must not get graphs."""
    plain = config_to_dict(TrainConfig()) | {"fuse": value}
    assert config_from_dict(plain, "--config x").fuse == meaning


@pytest.mark.parametrize("text", ["1", "1.0"])
def test_a_bare_one_is_no_radius(text):
    """1/255 was meant: 255/255 is the whole pixel range."""
    plain = config_to_dict(TrainConfig()) | {"eps": text}
    with pytest.raises(UserError, match=f"--eps {text}: the whole pixel range; did you mean"):
        config_from_dict(plain, "--config x")

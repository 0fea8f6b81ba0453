"""How perturbations are written and read."""

import pytest

from freeadv_fast.config.threat import Perturbation
from freeadv_fast.errors import UserError


@pytest.mark.parametrize(
    ("text", "levels", "shown"),
    [("4/255", 4, "4/255"), ("2.5/255", 2.5, "2.5/255"), ("0", 0, "0/255"), ("0.2", 51, "51/255")],
)
def test_reads_and_writes(text, levels, shown):
    """Fractions of 255 and bare fractions of the pixel range."""
    perturbation = Perturbation.parse(text)
    assert perturbation.levels == levels
    assert str(perturbation) == shown
    assert Perturbation.parse(shown) == perturbation


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "did you mean 4/255?"),
        ("-1/255", "cannot be negative"),
        ("four", "write it as 4/255"),
        ("4/0", "write it as 4/255"),
        ("nan", "write it as 4/255"),
        ("3.0", "an L2 radius is written 765/255"),
    ],
)
def test_refuses_with_the_flag_and_the_fix(text, message):
    """The commonest mistakes of this field."""
    with pytest.raises(UserError, match="--step-size") as caught:
        Perturbation.parse(text, "--step-size")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["0.0157", "0.012345678"])
def test_bare_fractions_print_back_exactly(text):
    """Not a whole number of levels; a saved config keeps every digit of it."""
    perturbation = Perturbation.parse(text)
    assert Perturbation.parse(str(perturbation)) == perturbation

"""The line with which a configuration is refused."""

import pytest

from csm.errors import InputError
from flows.config import load_config


def refused(name, *overrides):
    """The message with which a configuration is refused; always one line."""
    with pytest.raises(InputError) as caught:
        load_config(name, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)

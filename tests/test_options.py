"""
Values as users write them.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procwatch.errors import ConfigError
from procwatch.events import KINDS
from procwatch.options import MAX_BUFFER, MIN_BUFFER, buffer_bytes, event_kinds, size


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), (4096, 4096), ("64KiB", 65536), ("64kib", 65536), ("1MiB", 1 << 20), ("1M", 1 << 20),
     ("1MB", 10**6), ("1.5 GiB", 3 << 29), (" 8 k ", 8192), ("0", 0)],
)  # fmt: skip
def test_sizes(text: int | str, value: int):
    """
    Bytes, or a number with its unit.
    """
    assert size(text) == value


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1 MiB 2", "1e6", "0x10", "1TiB", "nan", "inf", "9" * 400, "1.", "1,5M"]
)
def test_what_is_no_size(text: str):
    """
    Said in one line that shows the value.
    """
    with pytest.raises(ConfigError, match="is not a size") as caught:
        size(text)
    assert "\n" not in str(caught.value)


@given(st.text() | st.integers())
def test_any_text_is_a_size_or_a_config_error(text: int | str):
    """
    Never another error.
    """
    try:
        assert size(text) >= 0
    except ConfigError:
        pass


def test_buffers_have_bounds():
    """
    None is each source's own; what no kernel takes is refused.
    """
    assert buffer_bytes(None) is None
    assert buffer_bytes("4KiB") == MIN_BUFFER
    assert buffer_bytes("1GiB") == MAX_BUFFER
    for impossible in ("4095", "1025MiB", 0):
        with pytest.raises(ConfigError, match="4KiB to 1GiB"):
            buffer_bytes(impossible)


def test_kinds_of_events_as_list_or_text():
    """
    Both forms are one set.
    """
    assert event_kinds("exec, exit") == event_kinds(["exit", "exec"]) == {"exec", "exit"}
    assert event_kinds(KINDS) == set(KINDS)


@pytest.mark.parametrize("kinds", ["", "exec,", "EXEC", "exec exit", ["ready"], [], ["exec", ""]])
def test_kinds_that_are_none(kinds: list[str] | str):
    """
    The error lists what there is.
    """
    with pytest.raises(ConfigError, match="choose of exec, fork, exit"):
        event_kinds(kinds)

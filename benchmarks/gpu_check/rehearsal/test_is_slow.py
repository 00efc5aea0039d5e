"""What the rehearsal plants last: tests that take longer than there is time."""

import time

import pytest


@pytest.mark.parametrize("number", range(100))
def test_that_takes_a_second(number: int) -> None:
    time.sleep(1)

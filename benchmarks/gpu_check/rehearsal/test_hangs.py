"""What the rehearsal plants first: a test that never comes back, between two that pass."""

import time


def test_before() -> None:
    pass


def test_that_hangs() -> None:
    time.sleep(3600)


def test_behind() -> None:
    pass

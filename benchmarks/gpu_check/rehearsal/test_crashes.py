"""What the rehearsal plants next: a test that takes its process down, and one that fails."""

import os


def test_that_crashes() -> None:
    os.abort()


def test_that_fails() -> None:
    assert 1 == 2, "planted"


def test_behind() -> None:
    pass

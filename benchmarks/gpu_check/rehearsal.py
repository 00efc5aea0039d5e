"""Tests that the rehearsal plants, in this order: they hang, crash or fail, and take longer than there is time."""

import os
import time

import pytest


class TestHangs:
    """A test that never comes back, between two that pass."""

    def test_before(self) -> None:
        pass

    def test_that_hangs(self) -> None:
        time.sleep(3600)

    def test_behind(self) -> None:
        pass


class TestCrashes:
    """A test that takes its process down, and one that fails."""

    def test_that_crashes(self) -> None:
        os.abort()

    def test_that_fails(self) -> None:
        assert 1 == 2, "planted"

    def test_behind(self) -> None:
        pass


class TestIsSlow:
    @pytest.mark.parametrize("number", range(100))
    def test_that_takes_a_second(self, number: int) -> None:
        time.sleep(1)

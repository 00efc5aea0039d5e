"""Steps of which one may hang or take the process down with it: what they found is in a file that is always whole."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reslora_kernels.bench.timing import DeviceLostError, one_line

STEP_SECONDS = 60.0  # what takes longer hangs
KERNEL_SECONDS = 20.0  # and from the launch of one kernel on
STOPPED = "it hung, or ended the process"


def write(path: Path, content: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(staged, path)


class Steps:
    """What each step found, by its name, and which kernels are wrong, with the reason.

    The file says what is running. If a process finds that there when it starts, the one before ended in that step: the
    kernel that was launched then is wrong, and the step is run without it; where there is none, it is not tried again.
    Without a path all is kept in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.found: dict[str, Any] = {"steps": {}, "wrong": {}, "running": None, "finished": False}
        if path is not None and path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))
        if stopped := self.found["running"]:
            kernel, step = stopped["kernel"], stopped["step"]
            if kernel and kernel not in self.wrong:
                self.wrong[kernel] = f"{step}: {STOPPED}"
            else:
                self.found["steps"][step] = {"failed": STOPPED}
            self.found["running"] = None

    @property
    def wrong(self) -> dict[str, str]:
        return self.found["wrong"]

    def run(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``work`` found, now or in a process before, or {"failed": why}; ends the process where it hangs.

        Raises:
            DeviceLostError: nothing more can be done in this process.
        """
        if name not in self.found["steps"]:
            self.found["running"] = {"step": name, "kernel": None}
            self._watch(STEP_SECONDS)
            try:
                found = work()
            except DeviceLostError:
                raise
            except (AssertionError, RuntimeError) as error:
                found = {"failed": one_line(error)}
            finally:
                faulthandler.cancel_dump_traceback_later()
            self.found["steps"][name] = found
            self.found["running"] = None
            self._keep()
        return self.found["steps"][name]

    def launching(self, kernel: str | None) -> None:
        """From here on that kernel is to blame, or none alone."""
        self.found["running"]["kernel"] = kernel
        self._watch(KERNEL_SECONDS if kernel else STEP_SECONDS)

    def finish(self, **conclusions: Any) -> None:
        self.found |= conclusions | {"finished": True}
        self._keep()

    def _watch(self, seconds: float) -> None:
        self._keep()
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

    def _keep(self) -> None:
        if self.path is not None:
            write(self.path, self.found)

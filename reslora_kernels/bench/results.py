"""The result file: JSON that is whole at every moment of a run, and a CSV beside it."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch

from reslora_kernels._version import __version__

FORMAT, VERSION = "reslora bench", 1
GPU_CHECK = "reslora gpu check"
TIMED, REFUSED, SKIPPED, FAILED = "timed", "refused", "skipped", "failed"
LIBRARIES = ("torch", "triton", "numpy", "peft", "transformers", "diffusers", "unsloth", "lorafusion")
SOURCE = Path(__file__).resolve().parents[2]


@dataclass
class Measurement:
    """One provider with one method in one case. Seconds and bytes are of all layers of the case together.

    Args:
        seconds: percentiles 20, 50 and 80 by phase: forward, backward, both.
        times_frozen: median over the rounds of the time relative to the frozen linears' in the same round, by phase.
        noise: what the median may be off by, relative: half a 95 % confidence interval, or what the frozen linears
            timed twice in the same rounds differ by, whichever is larger.
        least: the shortest of the rounds in seconds, by phase; of the host set only.
        error: largest relative error of a layer against float64 for y, dx, dA, dB; plain_error: plain PyTorch's.
        floor_seconds: what the case takes at the machine's own matmul rate and copy bandwidth, by phase.
    """

    set: str
    case: str
    provider: str
    method: str
    status: str
    reason: str | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    rounds: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    times_frozen: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    plain_error: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    floor_seconds: dict[str, float] = field(default_factory=dict)
    note: str | None = None
    least: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies it from run to run; a case may be in several sets."""
        return self.case, self.provider, self.method


@dataclass
class ModelMeasurement:
    """One way to adapt one model, a training step with AdamW. Seconds are percentiles 20, 50 and 80 of the whole step.

    Args:
        swept: what varies in the series this row belongs to, empty if none; ``value`` is its value here.
        times_frozen, noise: as in ``Measurement``, relative to the frozen model's forward and backward.
        per_second: tokens or samples, as ``unit`` says.
        peak_bytes: above weights, adapters and the optimizer's state.
        error: largest relative error against float64, of the output and of all adapters' gradients.
    """

    model: str
    swept: str
    value: int
    provider: str
    method: str
    status: str
    reason: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: int = 0
    seconds: list[float] = field(default_factory=list)
    times_frozen: float | None = None
    noise: float | None = None
    per_second: float | None = None
    unit: str = "tokens"
    peak_bytes: int | None = None
    error: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        swept = f" {self.swept}={self.value}" if self.swept else ""
        return f"{self.model}{swept}", self.provider, self.method


@dataclass
class Result:
    """A whole run. ``stopped`` says why it ended early, ``rates`` is the roofline's."""

    machine: dict[str, Any]
    commit: str | None
    uncommitted_changes: bool | None
    date: str
    settings: dict[str, Any]
    providers: dict[str, str] = field(default_factory=dict)
    rates: dict[str, Any] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    models: list[ModelMeasurement] = field(default_factory=list)
    stopped: str | None = None
    seconds: float = 0.0

    def rows(self) -> list[Measurement | ModelMeasurement]:
        """Everything, layers first."""
        return [*self.measurements, *self.models]

    def skipped(self) -> dict[str, list[str]]:
        """Providers by the reason for which they were left out."""
        reasons: dict[str, list[str]] = {}
        for row in self.rows():
            names = reasons.setdefault(row.reason or "", []) if row.status == SKIPPED else None
            if names is not None and row.provider not in names:
                names.append(row.provider)
        return reasons

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Replace the file, and the CSV beside it, whole or not at all."""
        for target, text in ((path, self.to_json()), (path.with_suffix(".csv"), to_csv(self))):
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = target.with_name(f".{target.name}.{os.getpid()}")
            staged.write_text(text, encoding="utf-8")
            os.replace(staged, target)


def share(row: Measurement, phase: str) -> float | None:
    """Of the floor that the row reached: floor / median."""
    return row.floor_seconds[phase] / row.seconds[phase][1] if phase in row.floor_seconds else None


def new_result(device: torch.device, settings: dict[str, Any]) -> Result:
    """An empty result of this machine and commit."""
    commit, changed = commit_of(SOURCE)
    return Result(machine_of(device), commit, changed, date.today().isoformat(), settings)


def read(path: Path) -> Result:
    """A result file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no result file of this release.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no result file: not valid JSON ({one_sentence(error)})") from None
    if isinstance(content, dict) and content.get("format") == GPU_CHECK:  # which holds such a result
        content = content.get("speed")
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{str(path)!r} is no result file of `reslora bench`")
    if (found := content.pop("version", None)) != VERSION:
        raise ValueError(f"{str(path)!r} has format version {found!r}, this release reads {VERSION}")
    try:
        content["measurements"] = [Measurement(**row) for row in content["measurements"]]
        content["models"] = [ModelMeasurement(**row) for row in content["models"]]
        return Result(**content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is a damaged result file: {one_sentence(error)}") from None


def one_sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def to_csv(result: Result) -> str:
    """One line per measurement and phase, with the machine, the versions and the commit on every line."""
    target = io.StringIO()
    columns = [
        "set",
        "case",
        "provider",
        "method",
        "status",
        "reason",
        "phase",
        "seconds_20",
        "seconds_50",
        "seconds_80",
    ]
    columns += ["times_frozen", "noise", "floor_seconds", "share_of_floor", "peak_bytes", "saved_bytes"]
    columns += ["error_y", "error_dx", "error_dA", "error_dB", "gpu", "cpu", "torch", "reslora_kernels", "commit"]
    writer = csv.DictWriter(target, columns, restval="", lineterminator="\n")
    writer.writeheader()
    origin = {name: result.machine.get(name) for name in ("gpu", "cpu", "torch")}
    origin |= {"reslora_kernels": result.machine.get("reslora_kernels"), "commit": result.commit}
    for row in result.measurements:
        common = {name: getattr(row, name) for name in columns[:6]} | origin
        common |= {f"error_{name}": value for name, value in row.error.items()}
        common |= {"peak_bytes": row.peak_bytes, "saved_bytes": row.saved_bytes}
        for phase, (low, median, high) in _phases(row).items():
            floor = row.floor_seconds.get(phase)
            timing = {"phase": phase, "seconds_20": low, "seconds_50": median, "seconds_80": high}
            timing |= {"times_frozen": row.times_frozen.get(phase), "noise": row.noise.get(phase)}
            timing |= {"floor_seconds": floor, "share_of_floor": floor / median if floor and median else None}
            writer.writerow(common | timing)
    for model in result.models:
        common = {"set": "models", "case": model.key[0], "provider": model.provider, "method": model.method} | origin
        common |= {"status": model.status, "reason": model.reason, "phase": "step", "peak_bytes": model.peak_bytes}
        timing = dict(zip(("seconds_20", "seconds_50", "seconds_80"), model.seconds, strict=False))
        writer.writerow(common | timing | {"noise": model.noise})
    return target.getvalue()


def _phases(row: Measurement) -> dict[str, Sequence[float | None]]:
    """Percentiles by phase; one phase without a name where nothing was timed."""
    return {**row.seconds} if row.seconds else {"": (None, None, None)}


def default_path(result: Result, folder: Path) -> Path:
    """<gpu or cpu>-<date>-<commit>.json, with a number behind it where that file is there already."""
    name = result.machine["gpu"] or "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    stem = f"{slug}-{result.date}-{(result.commit or 'unknown')[:10]}"
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    return path


def machine_of(device: torch.device) -> dict[str, Any]:
    """Where the figures come from: the machine without its name, driver and versions."""
    gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if gpu else None
    return {
        "gpu": properties.name if properties else None,
        "gpu_memory_bytes": properties.total_memory if properties else None,
        "gpu_processors": properties.multi_processor_count if properties else None,
        "gpu_l2_bytes": getattr(properties, "L2_cache_size", None) if properties else None,
        "driver": driver_version() if gpu else None,
        "cuda": torch.version.cuda,
        "cpu": processor_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "reslora_kernels": __version__,
        **{name: _version(name) for name in LIBRARIES},
    }


def driver_version() -> str | None:
    """The NVIDIA driver's version as its kernel module tells it."""
    file = Path("/proc/driver/nvidia/version")
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text(encoding="utf-8")) if file.is_file() else None
    return match[1] if match else None


def processor_name() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit_of(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of a clone and whether tracked files differ from it.

    Where the files were copied without their history, RESLORA_COMMIT may name the commit; else (None, None).
    """
    if not (folder / ".git").exists():
        return os.environ.get("RESLORA_COMMIT") or None, None
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def _version(name: str) -> str | None:
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return None

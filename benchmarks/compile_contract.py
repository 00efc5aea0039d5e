"""What the compiler makes of every kernel launch the package ships, for GPUs that are not here, and what it must hold.

python -m benchmarks.compile_contract                                  every configuration for every target
python -m benchmarks.compile_contract --target sm_90 --quick           a few of one
python -m benchmarks.compile_contract --output benchmarks/results/triton-contract-DATE.json

No GPU and no driver: a stand-in driver names the target, so that Triton's own just-in-time path specialises arguments,
compiles, and stops before it would load the result. The machine code is then read back. Exits with 1 on a violation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reslora_kernels.tuning.launch import Launch

ROOT = Path(__file__).parents[1]
NO_CODE = {  # comments, docstrings and spaces of a source
    ".py": re.compile(r'""".*?"""|#[^\n]*|\s+', re.DOTALL),
    ".cu": re.compile(r"//[^\n]*|\s+"),
}
NO_CODE |= dict.fromkeys((".cuh", ".h"), NO_CODE[".cu"])


@dataclass(frozen=True)
class Chip:
    """What one GPU generation has per multiprocessor (CUDA programming guide, compute capabilities; CDNA 3 ISA)."""

    arch: int | str
    shared_per_block: int
    shared: int
    max_warps: int
    max_blocks: int
    matrix: str  # its matrix instruction
    small_matrix: str  # that for tiles below 64 rows
    shared_reserved: int = 1024  # per block, by the driver

    @property
    def amd(self) -> bool:
        """AMD chips are named by a string, and count 64 threads to a warp."""
        return isinstance(self.arch, str)


CHIPS = {
    "sm_80": Chip(80, 166_912, 167_936, 64, 32, "HMMA", "HMMA"),
    "sm_89": Chip(89, 101_376, 102_400, 48, 24, "HMMA", "HMMA"),
    "sm_90": Chip(90, 232_448, 233_472, 64, 32, "HGMMA", "HMMA"),
    "sm_100": Chip(100, 232_448, 233_472, 64, 32, "UTCHMMA", "HMMA"),
    "sm_120": Chip(120, 101_376, 102_400, 48, 24, "HMMA", "HMMA"),
    "gfx942": Chip("gfx942", 65_536, 65_536, 32, 32, "MFMA", "MFMA", shared_reserved=0),
}
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG", "UTMAREDG", "UTMAREDP", "ATOMIC")
COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "MFMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG", "STG", "FFMA", *ATOMICS)
# One tt.dot of the first intermediate form: its input precision, rows, and operand type.
DOT = re.compile(r"tt\.dot [^:\n]*?(?:inputPrecision = (\w+))?\s*:\s*tensor<(\d+)x\d+x(\w+)>")


@dataclass(frozen=True)
class Compiled:
    """One launch as machine code: per thread, per block, and counts of the instructions that matter."""

    registers: int
    stack_bytes: int  # local memory of a thread, all but nothing of it wanted
    local_loads: int
    local_stores: int
    shared_bytes: int
    blocks: int  # that fit on one multiprocessor together, as far as registers, shared memory and warps allow
    occupancy: float  # their share of the warps that a multiprocessor can hold
    num_warps: int
    instructions: dict[str, int]
    matrix_dots: int  # products that ask for the matrix unit: all but those of exact float32 on NVIDIA
    wide_dots: int  # those of 16-bit operands with 64 rows or more, which the widest instruction must serve
    seconds: float


# Compiling without a GPU


class OfflineDriver:
    """Answers what Triton asks a driver before it loads a kernel, and nothing that it asks later."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        chip = CHIPS[target]
        self.target = GPUTarget("hip", chip.arch, 64) if chip.amd else GPUTarget("cuda", chip.arch, 32)
        self.device = list(CHIPS).index(target)

    def get_current_target(self) -> Any:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """A number for each target: Triton keeps compiled kernels by device."""
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        """Asked for at each launch, used by none."""
        return 0


@contextmanager
def offline(target: str) -> Iterator[None]:
    """Inside, Triton compiles for ``target``."""
    from triton.runtime import driver

    driver.set_active(OfflineDriver(target))
    try:
        yield
    finally:
        with suppress(RuntimeError):  # there is no other driver on a machine without a GPU
            driver.reset_active()


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile a launch as it would run on ``target``; tensors may be on the CPU or on "meta", and are not read.

    Raises:
        ValueError: unknown target, or Triton is in interpreter mode.
        Exception: what Triton raises where a kernel does not compile.
    """
    from reslora_kernels.tuning.launch import ALWAYS

    if target not in CHIPS:
        raise ValueError(f"target is {target!r}, expected one of {', '.join(CHIPS)}")
    if not hasattr(launch.kernel, "device_caches"):
        raise ValueError("Triton was imported with TRITON_INTERPRET=1: unset it to compile kernels")
    started = time.perf_counter()
    with offline(target):
        kernel = launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options, **ALWAYS)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
    chip = CHIPS[target]
    read = _read_amd(kernel) if chip.amd else _read_nvidia(kernel)
    dots = DOT.findall(kernel.asm["ttir"])
    on_matrix_unit = [dot for dot in dots if chip.amd or not (dot[2] == "f32" and dot[0] in ("", "ieee"))]
    found = Compiled(
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        blocks=0,
        occupancy=0.0,
        matrix_dots=len(on_matrix_unit),
        wide_dots=sum(int(rows) >= 64 and kind in ("bf16", "f16") for _, rows, kind in on_matrix_unit),
        seconds=time.perf_counter() - started,
        **read,
    )
    tensor_columns = getattr(kernel.metadata, "tmem_size", 0)
    blocks = resident_blocks(chip, found.registers, found.shared_bytes, found.num_warps, tensor_columns)
    return replace(found, blocks=blocks, occupancy=min(1.0, blocks * found.num_warps / chip.max_warps))


def resident_blocks(chip: Chip, registers: int, shared_bytes: int, num_warps: int, tensor_columns: int = 0) -> int:
    """Blocks that one multiprocessor holds at a time: the least that warps, registers and each memory allow."""
    if chip.amd:  # 4 SIMDs, each with 512 registers a thread in units of 8 and up to 8 waves
        by_registers = 4 * min(8, 512 // _round_up(max(registers, 1), 8)) // num_warps
    else:  # 65,536 registers, given to a warp in units of 256
        by_registers = 65_536 // (_round_up(max(registers, 1) * 32, 256) * num_warps)
    shared = _round_up(shared_bytes + chip.shared_reserved, 128)
    by_shared = chip.shared // shared if shared else chip.max_blocks
    by_tensor_memory = 512 // tensor_columns if tensor_columns else chip.max_blocks
    return min(chip.max_blocks, chip.max_warps // num_warps, by_registers, by_shared, by_tensor_memory)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# Reading machine code


def _read_nvidia(kernel: Any) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    counts = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE))
    return {
        "registers": used["REG"],
        "stack_bytes": used["STACK"] + used["LOCAL"],
        "local_loads": counts["LDL"],
        "local_stores": counts["STL"],
        "instructions": {name: counts[name] for name in COUNTED if counts[name]},
    }


def _read_amd(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]
    about = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    counts = Counter(re.findall(r"^\s+([a-z][a-z0-9_]+)", code, re.MULTILINE))
    grouped = {
        "MFMA": r"v_mfma_",
        "LDG": r"(global|buffer|flat)_load",
        "STG": r"(global|buffer|flat)_store",
        "LDGSTS": r"(global|buffer)_load_lds",
        "ATOMIC": r"(global|buffer|flat)_atomic",
    }
    totals = {name: sum(n for op, n in counts.items() if re.match(rule, op)) for name, rule in grouped.items()}
    return {
        "registers": about["vgpr_count"],
        "stack_bytes": about["private_segment_fixed_size"],
        "local_loads": sum(n for op, n in counts.items() if op.startswith("scratch_load")),
        "local_stores": sum(n for op, n in counts.items() if op.startswith("scratch_store")),
        "instructions": {name: n for name, n in totals.items() if n},
    }


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# The contract


def check(compiled: Compiled, target: str, expects_matrix: bool, expects_tma: int) -> list[str]:
    """The rules that a compiled launch breaks, in words; empty where it holds them all.

    Args:
        expects_tma: the least number of TMA loads and stores: one for each descriptor.
    """
    chip, count = CHIPS[target], compiled.instructions
    broken = []
    if expects_matrix:
        widest_possible = compiled.wide_dots and compiled.num_warps % 4 == 0
        allowed = {chip.matrix} if widest_possible else {chip.matrix, chip.small_matrix}
        if not any(count.get(name) for name in allowed):
            broken.append(f"no {' or '.join(sorted(allowed))}")
    if (compiled.stack_bytes or compiled.local_loads or compiled.local_stores) and not _calls_into_a_cluster(compiled):
        broken.append(
            f"spills: {compiled.stack_bytes} bytes of local memory, {compiled.local_loads} loads, "
            f"{compiled.local_stores} stores"
        )
    if compiled.shared_bytes > chip.shared_per_block:
        broken.append(f"{compiled.shared_bytes:,} bytes of shared memory, {chip.shared_per_block:,} allowed")
    atomics = {name: count[name] for name in ATOMICS if count.get(name)}
    if atomics:
        broken.append("atomics: " + ", ".join(f"{number} {name}" for name, number in atomics.items()))
    copies = count.get("UTMALDG", 0) + count.get("UTMASTG", 0)
    if copies < expects_tma:
        broken.append(f"{copies} TMA loads and stores, at least {int(expects_tma)} expected")
    return broken


def _calls_into_a_cluster(compiled: Compiled) -> bool:
    """Whether local memory is only what ptxas 12.9 sets up for sm_120 beside each TMA load, which is no spill.

    It is one argument of 8 bytes for a system call, made where a load goes to another block of a cluster: never here.
    """
    loads = compiled.instructions.get("UTMALDG", 0)
    return compiled.local_loads == 0 and compiled.stack_bytes <= 8 and compiled.local_stores <= loads


@dataclass
class Row:
    """One launch on one target: its result, or why there is none."""

    target: str
    purpose: str
    launch: str
    violations: list[str]
    compiled: Compiled | None = None
    options: dict[str, int] = field(default_factory=dict)


def contract(launches: Iterable[tuple[str, Launch]], target: str) -> Iterator[Row]:
    """Compile and check (purpose, launch) pairs; TMA is expected of a launch that takes descriptors."""
    for purpose, launch in launches:
        row = Row(target, purpose, str(launch), [], options=dict(launch.options))
        try:
            row.compiled = compile_launch(launch, target)
        except Exception as error:  # whatever stops the compiler is a finding about this launch
            row.violations = [f"does not compile: {type(error).__name__}: {str(error).strip()[:500]}"]
        else:
            descriptors = sum(hasattr(value, "block_shape") for value in launch.arguments.values())
            row.violations = check(row.compiled, target, row.compiled.matrix_dots > 0, descriptors)
        yield row


# The command


def shipped_rows(target: str, quick: bool) -> list[Row]:
    """The contract of what the package ships for one target; runs in a process of its own."""
    os.environ.pop("TRITON_INTERPRET", None)
    from .bytes_moved import shipped_launches

    return list(contract(shipped_launches(target, quick), target))


def show(rows: Sequence[Row]) -> None:
    """Print a table of the rows, then every violation."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if os.isatty(1) else 160, highlight=False)
    table = Table("target", "launch", "registers", "shared", "blocks", "occupancy", "instructions", "s", "holds")
    for row in rows:
        found, verdict = row.compiled, "[red]no" if row.violations else "yes"
        if found is None:
            table.add_row(row.target, escape(row.launch), *[""] * 6, verdict)
            continue
        counts = ", ".join(f"{n} {name}" for name, n in found.instructions.items() if name not in ("LDG", "STG"))
        table.add_row(
            *(row.target, escape(row.launch), str(found.registers), f"{found.shared_bytes / 1024:.0f} kB"),
            *(str(found.blocks), f"{found.occupancy:.0%}", counts, f"{found.seconds:.1f}", verdict),
        )
    console.print(table)
    for row in rows:
        for violation in row.violations:
            console.print(f"[red]{row.target}[/] {escape(f'{row.launch} ({row.purpose}): {violation}')}")
    broken = sum(bool(row.violations) for row in rows)
    targets = ", ".join(dict.fromkeys(row.target for row in rows))
    console.print(f"{len(rows)} launches compiled for {targets}; {broken} break the contract")


def kernel_sources() -> list[Path]:
    """The files whose kernels Triton compiles."""
    return [path for path in ROOT.glob("reslora_kernels/kernels/*.py") if "@triton.jit" in path.read_text("utf-8")]


def digest(sources: Iterable[Path]) -> str:
    """SHA-256 of their code, whatever is said about it: tells whether a result is of the sources as they are."""
    found = hashlib.sha256()
    for path in sorted(sources):
        found.update(NO_CODE[path.suffix].sub("", path.read_text("utf-8")).encode())
    return found.hexdigest()


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """What goes to the result file."""
    import triton

    return {
        "format": "triton contract",
        "date": date.today().isoformat(),
        "triton": triton.__version__,
        "sources": digest(kernel_sources()),
        "rows": [asdict(row) for row in rows],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, write; 1 if anything is violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(CHIPS), help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--quick", action="store_true", help="a few configurations per target")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets compiled at a time")
    parser.add_argument("--output", type=Path, help="write the rows to this JSON file")
    options = parser.parse_args(arguments)
    targets = options.target or list(TARGETS)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        results = pool.map(shipped_rows, targets, [options.quick] * len(targets))
        rows = [row for target_rows in results for row in target_rows]
    show(rows)
    if options.output:
        options.output.write_text(json.dumps(report(rows), indent=1) + "\n")
    return int(any(row.violations for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

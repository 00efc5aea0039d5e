"""What nvcc makes of every kernel in csrc/, for GPUs that are not here, and what it must hold.

python -m benchmarks.cuda_contract                                     every kernel for every architecture
python -m benchmarks.cuda_contract --arch 80 --source project.cu       one file for one
python -m benchmarks.cuda_contract --output benchmarks/results/cuda-contract-DATE.json

Needs nvcc, and the disassembler that comes with Triton; no GPU and no driver. Exits with 1 on a violation.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from reslora_kernels.cli.toolchain import find_nvcc

from .compile_contract import ATOMICS, digest

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "89", "90a", "100", "120")
OPTIONS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", "-Xptxas=-v")
FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
USAGE = re.compile(r"^ Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE)
REMARK = re.compile(r"\((C75\d\d)\).* in function '(\S+?)'")  # of ptxas, on wgmma and setmaxnreg
ROLE = re.compile(r"\bUSETMAXREG\S* (?:UP\d, )?(0x[0-9a-f]+)")
CONSUMER, PRODUCER = 232, 40  # registers of a thread of csrc/augmented_matmul*_sm90.cu, in 2 and 1 warpgroups
KEPT = ("HMMA", "LDSM", "LDGSTS", "HGMMA", "UTMALDG", "UTMASTG", "UBLKCP", "ACQBULK", "PREEXIT", "LDL", "STL", *ATOMICS)
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)(.*)", re.MULTILINE)
THREADS = re.compile(
    r"^\.nv\.info\.(\S+)$(?:(?!^\.nv\.info).)*?EIATTR_MAX_THREADS.*?Value:\s*(0x[0-9a-f]+)", re.M | re.S
)
REGISTERS_AT_ONCE, REGISTERS = 8, 64 << 10  # of a thread together, of a multiprocessor
# The portable matmul whose operands are copied as they are: blocks of a multiprocessor (its shared memory is checked in
# the source), and instructions in a step of its main loop beside the multiplications, ldmatrix and the copies.
AS_IS = re.compile(r"augmented_matmul_kernel<(?:Bf16|Fp16)Math, (Large|Small), [01], 0, 1>")
BLOCKS = {"Large": 2, "Small": 3}
MOST_BESIDE = 72


@dataclass
class Row:
    """One kernel on one architecture; ``stack_bytes`` a thread, and the instructions that matter.

    ``loop`` counts those of its main loop, ``blocks`` how many blocks of it have their registers on a multiprocessor.
    ``role_registers`` are those of setmaxnreg, ``remarks`` the numbers of what ptxas said on wgmma and setmaxnreg.
    """

    arch: str
    kernel: str
    registers: int
    stack_bytes: int
    instructions: dict[str, int]
    violations: list[str]
    role_registers: list[int] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    loop: dict[str, int] = field(default_factory=dict)
    blocks: int = 0


def kernel_sources() -> list[Path]:
    """What nvcc reads to compile the kernels."""
    return [path for suffix in ("cu", "cuh") for path in ROOT.glob(f"csrc/*.{suffix}")] + [ROOT / "csrc/params.h"]


def compile_source(source: Path, arch: str) -> tuple[list[Row], float]:
    """Every kernel of a source, and the seconds that nvcc took.

    Raises:
        RuntimeError: nvcc is missing or refuses the source.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc on PATH or under CUDA_HOME")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        started = time.perf_counter()
        said = _run(nvcc, *OPTIONS, f"-arch=sm_{arch}", str(source), "-o", str(cubin)).stderr
        seconds = time.perf_counter() - started
        usage = _output(*_tool("cuobjdump"), "--dump-resource-usage", str(cubin))
        code = _output(*_tool("cuobjdump"), "-sass", str(cubin))
        threads = dict(THREADS.findall(_output(*_tool("cuobjdump"), "-elf", str(cubin))))
    names, texts = FUNCTION.findall(code), FUNCTION.split(code)[2::2]
    by_name = dict(zip(names, texts, strict=True))
    rows = []
    for name, registers, stack, _, local in USAGE.findall(usage):
        instructions = [(int(at, 16), what, rest) for at, what, rest in INSTRUCTION.findall(by_name[name])]
        count = Counter(what for _, what, _ in instructions)
        found = {key: count[key] for key in KEPT if count[key]}
        row = Row(arch, _readable(name), int(registers), int(stack) + int(local), found, [])
        row.loop, row.blocks = main_loop(instructions), blocks_at_once(int(registers), int(threads[name], 16))
        row.role_registers = sorted({int(number, 16) for number in ROLE.findall(by_name[name])})
        row.remarks = sorted({code for code, function in REMARK.findall(said) if function == name})
        row.violations = check(row)
        rows.append(row)
    return sorted(rows, key=lambda row: row.kernel), seconds


def main_loop(instructions: Sequence[tuple[int, str, str]]) -> dict[str, int]:
    """All and the kept of (address, name, the rest) in the last loop that copies and multiplies; {} without one."""
    for at, what, rest in reversed(instructions):
        target = re.search(r"0x([0-9a-f]+)", rest) if what == "BRA" else None
        if target is None or int(target[1], 16) >= at:
            continue
        inside = [name for address, name, _ in instructions if int(target[1], 16) <= address <= at]
        count = Counter(name for name in inside if name != "NOP")  # which sm_120 has between its HMMA
        if count["HMMA"] and count["LDGSTS"]:
            return {"all": count.total()} | {key: count[key] for key in KEPT if count[key]}
    return {}


def blocks_at_once(registers: int, threads: int) -> int:
    """How many blocks a multiprocessor has registers for."""
    return REGISTERS // (threads * -(-registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE)


def check(row: Row) -> list[str]:
    """The rules that a kernel breaks, in words; empty where it holds them all."""
    count, broken = row.instructions, []
    if row.stack_bytes or count.get("LDL") or count.get("STL"):
        loads, stores = count.get("LDL", 0), count.get("STL", 0)
        broken.append(f"spills: {row.stack_bytes} bytes of local memory, {loads} loads, {stores} stores")
    multiplies = "Math" in row.kernel and "Ieee" not in row.kernel
    if multiplies and not count.get("HMMA"):
        broken.append("no HMMA")
    if multiplies and "Tf32" not in row.kernel and not count.get("LDSM"):
        broken.append("no LDSM")
    if "Math" in row.kernel and not count.get("LDGSTS"):
        broken.append("no LDGSTS")
    if row.kernel.startswith("project_hopper"):
        broken += [f"no {name}" for name in ("HGMMA", "UTMALDG", "ACQBULK", "PREEXIT") if not count.get(name)]
    elif "hopper" in row.kernel:
        broken += [f"no {name}" for name in ("HGMMA", "UTMALDG", "UTMASTG") if not count.get(name)]
        if row.role_registers != [PRODUCER, CONSUMER]:
            broken.append(f"registers of the roles: {row.role_registers}, not {[PRODUCER, CONSUMER]}")
    if matmul := AS_IS.fullmatch(row.kernel):
        beside = 2 * row.loop["all"] - sum(row.loop.values()) if row.loop else MOST_BESIDE + 1
        if beside > MOST_BESIDE:
            broken.append(f"{beside} instructions beside {row.loop.get('HMMA', 0)} HMMA in a step of the main loop")
        if row.blocks < BLOCKS[matmul[1]]:
            broken.append(f"registers for {row.blocks} blocks, not {BLOCKS[matmul[1]]}")
    broken += [f"ptxas remarks {code}" for code in row.remarks]
    # Of one launch a pass: its first tile, the next, blocks that have ended, parts of t that are there. No sums.
    progress = {"ATOMG": 3, "REDG": 1} if "one_pass_hopper" in row.kernel else {}
    broken += [f"atomics: {count[name]} {name}" for name in ATOMICS if count.get(name, 0) != progress.get(name, 0)]
    return broken


def _readable(mangled: str) -> str:
    """The kernel's name with its template arguments; a mangled name has each after its length, numbers as L..E."""
    kernel = re.search(r"\d([a-z][a-z_]*_kernel)", mangled)
    if kernel is None:
        return mangled
    known = r"\d([A-Z][A-Za-z0-9]*?Math|Large|Small|Bf16|Fp16)E|L[ib](\d+)E|I(f)E"
    words = ["".join(found) for found in re.findall(known, mangled[kernel.end() :])]
    return f"{kernel[1]}<{', '.join(words)}>" if words else kernel[1]


def _tool(name: str) -> list[str]:
    import triton

    return [str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)]


def _output(*command: str) -> str:
    return _run(*command).stdout


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{finished.stderr}")
    return finished


def contract(sources: Sequence[Path], archs: Sequence[str], jobs: int) -> Iterator[tuple[str, str, list[Row], float]]:
    """(source, architecture, rows, seconds of nvcc) of each pair."""
    pairs = [(path, arch) for arch in archs for path in sources if arch == "90a" or not path.stem.endswith("_sm90")]
    with ThreadPoolExecutor(jobs) as pool:
        for (source, arch), (rows, seconds) in zip(
            pairs, pool.map(lambda pair: compile_source(*pair), pairs), strict=True
        ):
            yield source.name, arch, rows, seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, write; 1 if anything is violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", help=f"default: {' '.join(ARCHITECTURES)}")
    parser.add_argument("--source", action="append", help="a file of csrc/; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--output", type=Path, help="write the rows to this JSON file")
    options = parser.parse_args(arguments)
    names = options.source or [path.name for path in sorted(ROOT.glob("csrc/*.cu"))]
    every: list[Row] = []
    total = 0.0
    for source, arch, rows, seconds in contract(
        [ROOT / "csrc" / name for name in names], options.arch or ARCHITECTURES, options.jobs
    ):
        every += rows
        total += seconds
        most = max(row.registers for row in rows)
        print(f"sm_{arch} {source}: {len(rows)} kernels, at most {most} registers, {seconds:.0f} s", flush=True)
    for row in every:
        for violation in row.violations:
            print(f"sm_{row.arch} {row.kernel}: {violation}")
    print(
        f"{len(every)} kernels; {sum(bool(row.violations) for row in every)} break the contract; {total:.0f} s of nvcc"
    )
    if options.output:
        version = _output(find_nvcc() or "nvcc", "--version").splitlines()[-2].strip()
        report = {"format": "cuda contract", "date": date.today().isoformat(), "nvcc": version}
        report |= {"sources": digest(kernel_sources()), "rows": [asdict(row) for row in every]}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row.violations for row in every))


if __name__ == "__main__":
    raise SystemExit(main())

"""A hook of mkdocs: the measured results that pages link to become part of the site, under their own paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHOWN = ("*.json", "*.png", "*/REPORT.md", "*/*.png")


def on_files(files: Files, config: Any) -> Files:
    results = ROOT / "benchmarks" / "results"
    for path in sorted({path for pattern in SHOWN for path in results.glob(pattern)}):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files

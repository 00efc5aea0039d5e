"""A hook of mkdocs: pages link to files of the repository, which become part of the site under their own paths.

In the repository a page reaches them through ``../``, one folder further than in the site, whose root is docs/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHOWN = ("benchmarks/results/*.json", "benchmarks/results/**/*.png", "benchmarks/results/*/REPORT.md")
SHOWN += ("examples/*.py", "examples/README.md", "CHANGELOG.md")
OUTSIDE = re.compile(r"\]\(\.\./((?:\.\./)*(?:benchmarks|examples)/)")


def on_files(files: Files, config: Any) -> Files:
    for path in sorted({path for pattern in SHOWN for path in ROOT.glob(pattern)}):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(r"](\1", markdown)

"""The paper's experiments, rerun: does ResLoRA learn faster than LoRA, which shortcut, and what does merging cost?

python -m benchmarks.convergence run --set quick --out FOLDER     train what FOLDER has no file of yet
python -m benchmarks.convergence report FOLDER                    REPORT.md and figures from FOLDER's files

``settings`` says what a set of runs is, ``methods`` and ``tasks`` what is compared and on what, ``runs`` trains one and
writes its JSON file, ``sets`` all of a set, ``summary`` compares them over seeds, ``report`` writes.
"""

"""Speed, memory and accuracy of the layers and of whole models against every peer; ``reslora bench`` runs it.

It ships with the package, so that a user of a wheel measures on their own machine what these kernels bring them. What
needs a clone of the repository stays in its ``benchmarks/``: pytest entries, the check of a GPU, tables, results.
"""

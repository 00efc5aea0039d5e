"""Triton kernels, one file per kernel: the jit kernel, then its launcher. No kernel imports another.

``device`` holds the device functions that kernels share, ``direct`` how compiled kernels are launched again; tiles and
what a launch is are in ``tuning``. What varies with the number of tokens is not specialised, so that a layer has a
handful of compiled kernels; parts of columns are given in blocks, of which the compiler knows what divides them.
"""

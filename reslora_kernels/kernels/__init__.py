"""Triton kernels, one file per kernel: the jit kernel, then its launcher. No kernel imports another.

``tiles`` holds the frozen tile configurations and the choice among them, ``launch`` what a launch is, ``device`` the
device functions that kernels share. What varies with the number of tokens is not specialised, so that a layer has a
handful of compiled kernels; parts of columns are given in blocks, of which the compiler knows what divides them.
"""

"""Triton kernels, one file per kernel: the jit kernel, then its launcher. No kernel imports another.

``tiles`` holds the frozen tile configurations and the choice among them, ``launch`` what a launch is, ``device`` the
device functions that kernels share.
"""

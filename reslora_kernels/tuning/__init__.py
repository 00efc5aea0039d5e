"""What is known of GPUs before a kernel runs: their sizes and rates, tiles that fit, what was measured, the choice.

A launch is a value here, too, so that it can be counted or compiled offline. Nothing in this room is a kernel.
"""

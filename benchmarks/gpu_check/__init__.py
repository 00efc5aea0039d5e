"""``make gpu-check``: is it right, clean and fast on this GPU; within a budget, in parts, in one result file."""

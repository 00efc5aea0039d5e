"""One module per way to compute the fused layer. Each has the same functions; ``select`` decides which one serves.

describe() -> str                      what this backend is, in a few words
unavailable_reason() -> str | None     why it cannot run on this machine, None when it can
unsupported_reason(x, weight, rank) -> str | None    why it cannot serve this call, naming the argument
explain(x, weight, rank) -> str        how it would compute this call, and why so
forward(...), backward(...)            the two passes, with the signatures of ``backends.torch``
"""

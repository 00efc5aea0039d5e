"""A whole model: which of its layers are adapted, which form a chain, and what the model remembers of that."""

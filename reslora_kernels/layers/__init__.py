"""The layers: ``ResLoRALinear`` and what it is made of. Chains link them, shortcuts say what each one computes."""

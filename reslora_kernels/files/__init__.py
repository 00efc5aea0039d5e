"""Adapters as files: this project's own format and PEFT's. Safetensors and JSON only."""

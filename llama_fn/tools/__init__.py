"""Programs beside train.py: python -m llama_fn.tools.NAME --help."""

"""The embedded demo: a tiny trained model of the Gemma 4 architecture, its tokenizer and its problems."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""The committed model folder: what `python -m data.tiny.build` writes, and any Hugging Face loader reads."""

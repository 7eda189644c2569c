"""Where the embedded model lies."""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""A Hugging Face model folder, as `python -m tests.tiny.build` writes it."""

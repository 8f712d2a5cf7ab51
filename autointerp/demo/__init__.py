"""The demo's own organism: a tiny language model, its SAE and an adapter, and the script that trains them."""

from pathlib import Path

ORGANISM = Path(__file__).parent / "organism"
"""Run directory of the demo: model, SAE, adapter, corpus and run.yaml."""

"""The tests of hf_lowmem, in folders that mirror the package; README.md says where each is."""

from pathlib import Path

ROOT = Path(__file__).parents[1]

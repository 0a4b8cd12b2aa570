"""The signal-to-noise ratio of second moments: measured, recorded, and turned into rules of what may be averaged."""

from hf_lowmem.snr.measure import Ratio, SecondMoment, candidates, factored_snr, snr, snr_of
from hf_lowmem.snr.rules import rules_from_csv
from hf_lowmem.snr.tracker import SnrTracker

__all__ = [
    "SnrTracker",
    "Ratio",
    "SecondMoment",
    "candidates",
    "factored_snr",
    "rules_from_csv",
    "snr",
    "snr_of",
]

"""Which way of learning from demonstrations works best: training baselines, pinned evaluation, verdicts with intervals."""

__version__ = "0.1.0"

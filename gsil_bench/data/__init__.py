"""Demonstrations, chat formats, pinned data files and the embedded suite."""

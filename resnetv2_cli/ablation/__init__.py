"""Rows of the paper, or of one's own, run under several seeds beside a baseline."""

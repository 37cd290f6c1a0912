"""Rows of the paper, or of the user's own, run with several seeds and compared with a baseline."""

"""One HTML page of what is on disk, compared with the paper."""

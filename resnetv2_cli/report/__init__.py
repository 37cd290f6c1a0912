"""One page that shows what is on disk, beside the paper."""

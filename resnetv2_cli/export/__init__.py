"""Export to files that other tools run, checked against the network they were made from."""

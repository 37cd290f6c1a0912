"""What leaves the tool: files that others run, checked against the network they were made from."""

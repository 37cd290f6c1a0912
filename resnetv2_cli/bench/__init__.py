"""Speed of the tool, compared with what most people run and with what the machine allows."""

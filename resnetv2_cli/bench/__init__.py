"""How fast the tool is, beside what most people run and beside what the machine allows."""

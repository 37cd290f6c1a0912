"""The commands: parse, call, show. They decide nothing."""

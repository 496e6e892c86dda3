"""The command line: one YAML file and flags, checked whole, then handed to the objects."""

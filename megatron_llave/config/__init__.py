"""The configuration tree: its sections, reading it from YAML and the command line, checks, and presets."""

"""The configuration tree: its sections, its presets, its checks, and reading it from YAML and the command line."""

"""The options of commands whose own imports take seconds: NAME.py has `build_parser` and `parse` of `llave NAME`.

Nothing here loads torch, so that `--help`, a wrong argument and completion need no second.
"""

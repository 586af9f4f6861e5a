"""The commands of the command line, one file each with `main(argv)`; each parses, calls the package and prints.

The files in tools/ start the same commands from a clone.
"""

"""Starts the processes of a command on this node, one per GPU: what the launch files and the command line share.

It loads neither torch nor the rest of the package, which takes seconds: only the processes that it starts do.
"""

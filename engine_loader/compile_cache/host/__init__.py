"""What code that compilers make depends on: processor, tools, libraries and versions of this machine.

Nothing here imports torch, and nothing initialises CUDA: a process that did could not be forked any more.
"""

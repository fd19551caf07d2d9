"""Drop-in modules: the names of other packages over this one, for programs that were written for them.

``b10_transfer`` and ``fastsafetensor_3fs_reader`` are named after the packages that they replace.
"""

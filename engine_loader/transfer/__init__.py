"""How bytes move: plans of extents, the engines that carry them out, and the buffers they fill."""

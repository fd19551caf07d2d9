"""How a start goes faster: what its processes need is imported once for all of them. See docs/start.md."""

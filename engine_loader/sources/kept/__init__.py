"""What is read of object stores, kept on a disk of this node for the next start."""

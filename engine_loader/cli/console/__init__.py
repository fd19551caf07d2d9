"""What the commands share: output, Ctrl-C, and engines that run within a command."""

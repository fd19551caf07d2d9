"""What `engine-loader inspect` finds out about a checkpoint."""

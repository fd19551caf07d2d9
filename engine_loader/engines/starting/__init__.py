"""What the engines' starts are: which processes they make, and what these import. See docs/start.md."""

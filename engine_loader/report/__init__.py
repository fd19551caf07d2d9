"""What a person sees of a load: progress while it runs, one line when it is done."""

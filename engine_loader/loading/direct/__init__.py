"""Direct mode: copies are recorded, planned, and carried out straight into the parameters."""

"""``python -m engine_loader`` is the command ``engine-loader``."""

from .cli import app

app(prog_name="engine-loader")

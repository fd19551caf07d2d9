"""Checks of ``engine-loader doctor``. Every function ``check_…`` yields findings."""

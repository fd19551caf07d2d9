"""Thin adapters, one an engine: they know an engine's names, and nothing below them does."""

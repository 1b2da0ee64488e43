"""Placeholder docstring replaced as the part grows."""

"""Personalisation on real clients: every algorithm tuned with the same budget, on clients old and new."""

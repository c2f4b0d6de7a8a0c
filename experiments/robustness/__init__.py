"""Rules against attacks on real data: who holds how much accuracy against the worst that is tried on it."""

"""What an upload gives away, bounded: clipping, noise, accounting, secure aggregation."""

__all__: list[str] = []

"""What a function needs in memory, told from its trace."""

from cedarjax.core.memory.estimate import MemoryEstimate as MemoryEstimate
from cedarjax.core.memory.estimate import memory_estimate as memory_estimate

__all__ = ["MemoryEstimate", "memory_estimate"]

"""The cache: which pages and state slots hold which tokens. Its bookkeeping imports no torch."""

from foveal.cache.manager import CacheManager, CacheUsage, Copies, most_pages
from foveal.cache.pool import BlockPool
from foveal.config.formats import PAGE_SIZE

__all__ = ["PAGE_SIZE", "BlockPool", "CacheManager", "CacheUsage", "Copies", "most_pages"]

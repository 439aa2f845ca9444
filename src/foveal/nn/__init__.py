"""Layers: mixers, the indexer, feed-forwards, and the batch that they all work on."""

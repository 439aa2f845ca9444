"""Is a model still good, and does it look where it matters: perplexity, retrieval, quality of selections."""

"""Training: recipes, data, stages."""

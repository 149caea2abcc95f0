"""Models that are measured or predicted: dimensions, random weights, prompts."""

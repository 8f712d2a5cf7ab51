"""The labeling half: turns evidence into labels and scores. Knows language models and rate limits; loads no torch."""

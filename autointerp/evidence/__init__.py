"""The evidence half: what an adapter changed, measured in tensors. Never imports the labeling half."""

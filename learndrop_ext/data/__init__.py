"""Loading: from the user's DataLoader to batches of cached rows."""

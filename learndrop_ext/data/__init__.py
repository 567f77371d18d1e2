"""From the user's loader to batches of rows."""

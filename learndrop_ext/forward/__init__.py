"""The user's own forward: where it can be cut, and how it runs on rows."""

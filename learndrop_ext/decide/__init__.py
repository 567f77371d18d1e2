"""What is measured, what it costs, and the policies that decide from it. Nothing here changes a model."""

"""The cached rows of a cut: their layout, their tiers, their files."""

"""From trained shortcuts to plain low-rank updates: the statistics that merging needs, the fits, the merge itself."""

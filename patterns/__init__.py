"""One file per fusion: its meaning, the source graphs exporters write for it, and its lowerings."""

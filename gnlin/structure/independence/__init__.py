"""Which examples of a batch are shown to be independent."""

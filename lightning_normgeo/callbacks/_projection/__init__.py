"""Parts of SphereProjection: the search for blocks, their projection, and its log."""

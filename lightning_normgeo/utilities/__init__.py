"""Files, texts, checked values and versions: helpers that know nothing of normalization."""

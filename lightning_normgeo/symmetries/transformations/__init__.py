"""Transformations of a module by its scale symmetries, with its optimizer states and batch normalizations."""

"""Output formats of a report: HTML, Markdown, CSV and LaTeX."""

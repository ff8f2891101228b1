"""Statistics of per-sample results: intervals, tests, correlations, and summaries over attacks."""

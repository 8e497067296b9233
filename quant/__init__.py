"""Number formats, observers, rounding and bit allocation; no graph code."""

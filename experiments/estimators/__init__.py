"""The figures of the papers on estimators through an unrolled loop."""

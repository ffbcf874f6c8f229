"""Measures of reconstruction, retrieval, likelihood and generation, and the report."""

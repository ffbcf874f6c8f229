"""Tests of the measures of a visual tokenizer on the user's data."""

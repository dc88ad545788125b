"""Whose requests they are: keys, what each of them may ask, and what was used on its account."""

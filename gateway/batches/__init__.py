"""OpenAI's batches: checked whole, asked line by line after all others, and made two files of."""

"""OpenAI's files, kept on this machine: they come in pieces, and nobody sees one that is not whole."""

"""The endpoints of a gateway: described by the environment or a file, each with a line of those who wait."""

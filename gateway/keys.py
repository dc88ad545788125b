"""The gateway's key: given by the user, or made here and shown once."""

from __future__ import annotations

from dataclasses import dataclass, field

from handler import auth


@dataclass(frozen=True, slots=True)
class Keys:
    """Who may come in. `shown` is the key that was made here, for the one time it is printed."""

    ring: auth.Keyring
    shown: str | None = field(repr=False)

    @classmethod
    def open(cls, api_key: str | None) -> Keys:
        """The key `api_key`, or a new one if there is none. Only its hash is kept."""
        if api_key is not None:
            return cls(auth.Keyring.of(api_key), None)
        made = auth.generate()
        return cls(auth.Keyring.of(made), made)

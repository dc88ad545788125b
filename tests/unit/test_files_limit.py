"""How many files the gateway may have open."""

from __future__ import annotations

import resource

from gateway.serve import FILES_MAX, raise_files_limit


def test_the_limit_is_what_the_system_lets() -> None:
    """A low one is raised as far as that goes, a higher one is kept."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        raise_files_limit()
        raised, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert raised == (FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX))
        raise_files_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (raised, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))

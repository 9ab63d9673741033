"""The browser of the page's tests: which of its two programs is missing, and how to install it."""

from __future__ import annotations

import shutil

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def missing_programs(chromium: str | None = CHROMIUM, driver: str | None = DRIVER) -> str | None:
    """The reason to skip browser tests, or None."""
    packages = [
        (name, package)
        for name, package, path in (("chromium", "chromium", chromium), ("chromedriver", "chromium-driver", driver))
        if path is None
    ]
    if not packages:
        return None
    names = " and ".join(name for name, _ in packages)
    return f"{names} not found (Debian: apt-get install {' '.join(package for _, package in packages)})"

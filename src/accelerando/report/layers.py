"""The page's section on the profile of the original."""
from __future__ import annotations
from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element
def section(profile: Mapping[str, Any] | None) -> Element | None:
    return None

"""Scopes: what a credential may, as people write it.

    *                            everything
    predict                      every model and endpoint
    predict:model/NAME           one model: calling and describing it
    predict:endpoint/NAME        one endpoint, and not the model behind it
    health, metrics, reflection, admin

A NAME that ends in `*` stands for all names that begin so, such as `predict:endpoint/spam/*`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

PAGES = ("health", "metrics", "reflection", "admin")
EXPECTED = (
    "`*`, `predict`, `predict:model/NAME`, `predict:endpoint/NAME` (NAME may end in `*`), " + ", ".join(PAGES[:-1])
) + f" or {PAGES[-1]}"


class Scopes:
    """A set of scopes. Immutable.

    Args:
        texts: The scopes as written.
        denied: Pages that none of them covers.

    Raises:
        ValueError: One is none; the text says what is expected.
    """

    def __init__(self, texts: Iterable[str], denied: Iterable[str] = ()) -> None:
        self.texts = tuple(dict.fromkeys(texts))
        self.denied = frozenset(denied)
        self._exact: set[str] = set()  # "model/spam", "metrics"
        self._prefixes: list[str] = []  # "endpoint/spam/"
        for text in self.texts:
            self._add(text)

    def _add(self, text: str) -> None:
        action, colon, resource = text.partition(":")
        kind, slash, name = resource.partition("/")
        if text == "*":
            self._prefixes.append("")
        elif text == "predict":
            self._prefixes += ["model/", "endpoint/"]
        elif text in PAGES:
            self._exact.add(text)
        elif action == "predict" and colon and slash and kind in {"model", "endpoint"} and name:
            if name.endswith("*"):
                self._prefixes.append(resource[:-1])
            else:
                self._exact.add(resource)
        else:
            raise ValueError(f"{text!r} is not a scope; expected {EXPECTED}")

    def grant(self, right: str) -> bool:
        """Whether one of them covers a right: a page such as "metrics", or "model/NAME", "endpoint/NAME"."""
        return right not in self.denied and (
            right in self._exact or any(right.startswith(prefix) for prefix in self._prefixes)
        )

    @property
    def predicts(self) -> bool:
        """Whether there is any model or endpoint that they may cover."""
        return bool(self._prefixes) or any("/" in right for right in self._exact)

    def without(self, pages: Iterable[str]) -> Scopes:
        """The same but for some pages, which no scope then covers."""
        return Scopes(self.texts, self.denied.union(pages))

    def __or__(self, other: Scopes) -> Scopes:
        return Scopes((*self.texts, *other.texts), self.denied | other.denied)

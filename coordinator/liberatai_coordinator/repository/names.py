"""Names of models, tags, commits and places in registries: what is allowed, and what a text means."""

import re
from dataclasses import dataclass
from typing import Final

from liberatai_core.errors import NotFoundError, SchemaError

MODEL: Final = r"^[a-z0-9_-]{1,64}(/[a-z0-9_-]{1,64}){0,7}\Z"
TAG: Final = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z"
DIGEST: Final = r"^sha256:[0-9a-f]{64}\Z"
BRANCH: Final = "latest"
"""The branch that commits go to if nobody names another one."""

_MODEL, _TAG, _DIGEST = re.compile(MODEL), re.compile(TAG), re.compile(DIGEST)
_PREFIX: Final = re.compile(r"(sha256:)?([0-9a-f]{4,64})")
_PLACE: Final = re.compile(
    r"(?P<host>[A-Za-z0-9.-]{1,253}(:[0-9]{1,5})?|\[[0-9a-fA-F:]{2,45}\](:[0-9]{1,5})?)"
    r"/(?P<name>[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*)"
    r"(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a person wrote to name a commit: a model and a tag, or the beginning of a digest, or both.

    Attributes:
        model: "" if only a digest was written.
        tag: "" if a digest or a number was written.
        prefix: beginning of the hex digest; "" if none was written.
        number: of a version; None if none was written.
        back: so many first parents before it.
    """

    model: str
    tag: str = ""
    prefix: str = ""
    number: int | None = None
    back: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A name at a registry, e.g. `registry.example.org/lab/digits:v1@sha256:…`."""

    host: str
    name: str
    tag: str
    digest: str = ""

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"{self.host}/{self.name}:{self.tag}" + (f"@{self.digest}" if self.digest else "")


def require_model(name: str) -> str:
    """Return the name of a model, or raise SchemaError."""
    if not _MODEL.fullmatch(name):
        raise SchemaError(
            f"model {name[:80]!r}: a-z, digits, _ and -, at most 64 of them, parts divided by /"
        )
    return name


def require_tag(tag: str) -> str:
    """Return a tag or the name of a branch, or raise SchemaError."""
    if not _TAG.fullmatch(tag) or tag.isdigit():
        raise SchemaError(f"tag {tag[:80]!r}: letters, digits, . _ and -, at most 128, not a number")
    return tag


def require_digest(digest: str) -> str:
    """Return a digest, or raise SchemaError."""
    if not _DIGEST.fullmatch(digest):
        raise SchemaError(f"digest {digest[:80]!r}: must be sha256: and 64 hex digits")
    return digest


def parse_ref(text: str) -> Wanted:
    """Return what `digits`, `digits:v1`, `digits:12`, `digits@3f9a`, `digits~2` or `3f9a` mean.

    A word of four to 64 hex digits alone is taken for the beginning of a digest by whoever finds no model of
    that name.

    Raises:
        SchemaError: it names nothing.
    """
    base, tilde, steps = text.partition("~")
    if tilde and not (steps.isdigit() and len(steps) <= 6):
        raise SchemaError(f"{text[:80]!r}: write ~ and a number, e.g. digits~1")
    back = int(steps) if tilde else 0
    if base.startswith("sha256:"):
        return Wanted(model="", prefix=_prefix(base, text), back=back)
    named, at, digest = base.partition("@")
    name, colon, tag = named.partition(":")
    require_model(name)
    if at:
        return Wanted(model=name, prefix=_prefix(digest, text), back=back)
    if colon and tag.isdigit():
        return Wanted(model=name, number=int(tag[:12]), back=back)
    return Wanted(model=name, tag=require_tag(tag) if colon else "", back=back)


def _prefix(text: str, whole: str) -> str:
    found = _PREFIX.fullmatch(text)
    if found is None:
        raise SchemaError(f"{whole[:80]!r}: a digest has 4 … 64 hex digits")
    return found[2]


def looks_like_digest(name: str) -> bool:
    """Whether a name could be the beginning of a digest."""
    return _PREFIX.fullmatch(name) is not None


def full_ref(model: str, tag: str) -> str:
    """Return how a tag stands in the layout's index."""
    return f"{require_model(model)}:{require_tag(tag)}"


def parse_place(text: str) -> Place:
    """Return the place at a registry that a text names; the tag is `latest` if none is written.

    Raises:
        SchemaError: it names none.
    """
    found = _PLACE.fullmatch(text)
    if found is None or len(text) > 512:
        raise SchemaError(f"{text[:120]!r}: write REGISTRY/NAME:TAG, e.g. registry.example.org/lab/digits:v1")
    return Place(
        host=found["host"], name=found["name"], tag=found["tag"] or BRANCH, digest=found["digest"] or ""
    )


def short(digest: str) -> str:
    """Return the twelve hex digits by which people call a commit."""
    return digest.removeprefix("sha256:")[:12]


def unknown(text: str) -> NotFoundError:
    """Return the error of a name that leads to no commit."""
    return NotFoundError(f"{text[:120]}: no such model, tag or commit here (see `liberatai models list`)")

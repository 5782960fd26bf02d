"""An invitation as one word that an operator copies to a device. Both ends.

The word is base64url (RFC 4648) of a compressed msgpack array. It holds the claim's private key and
certificate, with which the broker lets the device in by the door for claims; the authority's certificate, by
which the device knows the broker; and the coordinator's public key, which alone it obeys from then on.
"""

import base64
import binascii
import zlib
from typing import Annotated

import msgspec
from msgspec import Meta

from liberatai_core.contract import limits
from liberatai_core.contract.topics import FLEET_OR_DEVICE
from liberatai_core.errors import TokenError

PREFIX = "lai1-"
MAX_CHARACTERS = 16_384
MAX_BYTES = 32_768
_Certificate = Annotated[bytes, Meta(min_length=1, max_length=limits.MAX_CERTIFICATE_BYTES)]
_Id = Annotated[str, Meta(pattern=FLEET_OR_DEVICE)]


class Token(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """An invitation.

    Attributes:
        fleet: to which it invites.
        coordinator: name of who invites.
        coordinator_key: its Ed25519 public key.
        broker: mqtts:// URL of the door for devices.
        claim_broker: mqtts:// URL of the door for claims.
        authority: its certificate (DER).
        certificate: of the claim (DER).
        key: the claim's private key: the number of a P-256 key.
        expires_s: Unix seconds of the coordinator after which it is worth nothing.
        device: name that the device must take; "": any that is free.
    """

    fleet: _Id
    coordinator: _Id
    coordinator_key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    broker: Annotated[str, Meta(max_length=256)]
    claim_broker: Annotated[str, Meta(max_length=256)]
    authority: _Certificate
    certificate: _Certificate
    key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    expires_s: Annotated[float, Meta(ge=0, le=2**53)]
    device: Annotated[str, Meta(pattern=r"^[a-z0-9-]{0,32}\Z")] = ""


_DECODER = msgspec.msgpack.Decoder(Token)


def write_token(token: Token) -> str:
    """Return the word that stands for an invitation."""
    packed = zlib.compress(msgspec.msgpack.encode(token), 9)
    return PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")


def read_token(word: str) -> Token:
    """Return the invitation that a word stands for.

    Raises:
        TokenError: it is none, or a part of it is missing.
    """
    word = "".join(word.split())
    if not word.startswith(PREFIX):
        raise TokenError(
            f"a token begins with {PREFIX}: copy the line that `liberatai devices invite` printed"
        )
    if len(word) > MAX_CHARACTERS:
        raise TokenError(f"{len(word)} characters: no token is that long")
    body = word.removeprefix(PREFIX)
    try:
        packed = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        inflate = zlib.decompressobj()
        data = inflate.decompress(packed, MAX_BYTES)
        if not inflate.eof or inflate.unused_data:
            raise TokenError("a part of the token is missing: copy the whole line")
        return _DECODER.decode(data)
    except (binascii.Error, zlib.error, msgspec.MsgspecError, ValueError):
        raise TokenError("the token is damaged: copy the whole line again") from None

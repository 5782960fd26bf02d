"""The authority in its folder: keys, a list of everything that was issued, lists of what was revoked.

Two authorities lie side by side. `ca` signs devices, coordinators and the broker. `claims` signs claim
credentials, which the broker lets in through a door of their own, where nothing can be done but to ask for a
certificate. Both keep one list, `issued.jsonl`: a line per certificate before anybody gets it, and a line
per revocation. A certificate that was revoked stays in the list (a tombstone) until it would have ended
anyway.

Commands and a running coordinator use the folder at the same time: whoever writes holds its lock.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Literal

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from liberatai_coordinator import clock
from liberatai_coordinator.authority.signing import (
    DAY_S,
    Role,
    Signer,
    issue,
    make_authority,
    revocation_list,
)
from liberatai_core.certificates import facts, key_of, key_pem, load, new_key
from liberatai_core.contract.topics import CLAIM_PREFIX, claim_name, require_id
from liberatai_core.errors import CertificateError, DiskError, NotFoundError, StateError
from liberatai_core.files import make_folder, write_durably

Kind = Literal["ca", "claims"]
KINDS: Final[tuple[Kind, ...]] = ("ca", "claims")
LIST: Final = "issued.jsonl"
KEPT_S: Final = 30 * DAY_S
"""A certificate stays in the lists for so long after its end: a broker's clock may be behind."""
LARGE_BYTES: Final = 8 << 20
"""A list that has grown to this loses what ended long ago."""


class Issued(msgspec.Struct, frozen=True, kw_only=True):
    """One certificate that was issued.

    Attributes:
        serial: number of the certificate, in hex.
        authority: which of the two signed it.
        start_s, end_s: Unix seconds between which it is valid.
        revoked_s: when it was revoked; None: it was not.
        reason: why it was revoked.
    """

    serial: str
    name: str
    role: str
    authority: Kind
    start_s: float
    end_s: float
    revoked_s: float | None = None
    reason: str = ""

    def state(self, now_s: float) -> Literal["valid", "revoked", "expired"]:
        """Return what it is worth now."""
        if self.revoked_s is not None:
            return "revoked"
        return "valid" if now_s < self.end_s else "expired"


class _Revoked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    revoked: str
    at_s: float
    reason: str = ""


_ISSUED = msgspec.json.Decoder(Issued)
_REVOKED = msgspec.json.Decoder(_Revoked)


class Authority:
    """A fleet's authority in one folder.

    Args:
        folder: with its files; see `create`.

    Raises:
        NotFoundError: there is none in the folder.
        CertificateError, DiskError: its files cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._signers: dict[Kind, Signer] = {}
        self.certificates: dict[Kind, bytes] = {kind: self._read(kind) for kind in KINDS}
        self.fleet = facts(self.certificates["ca"]).fleet

    @classmethod
    def create(cls, folder: Path, fleet: str, now_s: float | None = None) -> "Authority":
        """Make both authorities and their empty lists; never over those that are there.

        Raises:
            StateError: there is one already. TopicError: no fleet can have this name. DiskError.
        """
        require_id(fleet, "fleet")
        now_s = clock.wall() if now_s is None else now_s
        if any((folder / f"{kind}.key").exists() for kind in KINDS):
            raise StateError(f"{folder} holds an authority: a new one would shut out every device")
        try:
            make_folder(folder)
            for kind in KINDS:
                key = new_key()
                root = make_authority(key, fleet, "authority" if kind == "ca" else "claims", now_s)
                write_durably(folder / f"{kind}.key", key_pem(key))
                pem = root.public_bytes(serialization.Encoding.PEM)
                write_durably(folder / f"{kind}.crt", pem, mode=0o644)
            made = cls(folder)
            with made._locked():
                made._write_lists([], now_s)
        except OSError as error:
            raise DiskError(f"{folder}: {error.strerror}") from error
        return made

    # --- issuing -------------------------------------------------------------------------------

    def issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        role: Role,
        name: str,
        lifetime_s: float,
        *,
        hosts: Sequence[str] = (),
        now_s: float | None = None,
    ) -> bytes:
        """Return a certificate (DER); it is in the list before this returns.

        Args:
            public_key: of the holder.
            role: what it is for; a claim is signed by the authority for claims.
            name: its common name.
            lifetime_s: how long it is valid.
            hosts: of a server.
            now_s: Unix seconds; None: now.

        Raises:
            CertificateError: nobody may have this name in this role.
            NotFoundError: the authority's key is not here. DiskError: it cannot be noted.
        """
        now_s = clock.wall() if now_s is None else now_s
        if role != "server":
            require_id(name, "name")
        if (role == "claim") != name.startswith(CLAIM_PREFIX):
            raise CertificateError(f"{name}: names that begin with {CLAIM_PREFIX} belong to claims alone")
        kind: Kind = "claims" if role == "claim" else "ca"
        signer = self._signer(kind)
        with self._locked():
            if role in ("device", "coordinator"):
                self._require_free(name, role, now_s)
            der = issue(signer, public_key, self.fleet, role, name, now_s, lifetime_s, hosts)
            made = facts(der)
            self._append(
                Issued(
                    serial=f"{made.serial:x}",
                    name=name,
                    role=role,
                    authority=kind,
                    start_s=made.start_s,
                    end_s=made.end_s,
                )
            )
        return der

    def _require_free(self, name: str, role: Role, now_s: float) -> None:
        other = "coordinator" if role == "device" else "device"
        if any(one.role == other and one.state(now_s) == "valid" for one in self._of(name)):
            raise CertificateError(f"{name}: a {other} has this name: the broker could not tell them apart")

    # --- looking -------------------------------------------------------------------------------

    def issued(self) -> list[Issued]:
        """Return everything in the list, the oldest first.

        Raises:
            DiskError: it cannot be read.
        """
        found: dict[str, Issued] = {}
        try:
            with (self.folder / LIST).open("rb") as file:
                for line in file:
                    _take(line, found)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DiskError(f"{self.folder / LIST}: {error.strerror}") from error
        return list(found.values())

    def _of(self, name: str) -> list[Issued]:
        return [one for one in self.issued() if one.name == name]

    def newest(self, name: str) -> Issued | None:
        """Return the certificate of a device or coordinator that ends last, None if it never had one."""
        found = [one for one in self._of(name) if one.authority == "ca"]
        return max(found, key=lambda one: one.end_s, default=None)

    # --- revoking ------------------------------------------------------------------------------

    def revoke(self, name: str, reason: str = "", *, now_s: float | None = None) -> list[Issued]:
        """Revoke every certificate of a name that has not ended; claims made for it, too. Idempotent.

        Both lists of revoked certificates are written anew; a broker must load them (`broker_files.sync`).

        Args:
            name: common name.
            reason: shown by `issued`.
            now_s: Unix seconds; None: now.

        Returns:
            What is revoked now of this name.

        Raises:
            NotFoundError: nobody of this name ever had a certificate, or the authority's key is not here.
            DiskError: it cannot be written.
        """
        now_s = clock.wall() if now_s is None else now_s
        names = {name, claim_name(name)}
        with self._locked():
            found = [one for one in self.issued() if one.name in names]
            if not found:
                raise NotFoundError(f"{name}: never had a certificate of this authority")
            live = [one for one in found if one.state(now_s) == "valid"]
            for one in live:
                self._append(_Revoked(revoked=one.serial, at_s=now_s, reason=reason))
            self._write_lists(self.issued(), now_s)
            return [one for one in self.issued() if one.name in names and one.revoked_s is not None]

    def revoke_serial(self, serial: str, reason: str = "", *, now_s: float | None = None) -> Issued:
        """Revoke one certificate by its number; idempotent.

        Raises:
            NotFoundError: none with this number. DiskError.
        """
        now_s = clock.wall() if now_s is None else now_s
        with self._locked():
            found = {one.serial: one for one in self.issued()}
            if serial not in found:
                raise NotFoundError(f"no certificate has the number {serial}: see `liberatai ca list`")
            if found[serial].revoked_s is None:
                self._append(_Revoked(revoked=serial, at_s=now_s, reason=reason))
            self._write_lists(self.issued(), now_s)
            return next(one for one in self.issued() if one.serial == serial)

    # --- files ---------------------------------------------------------------------------------

    def _read(self, kind: Kind) -> bytes:
        path = self.folder / f"{kind}.crt"
        try:
            pem = path.read_bytes()
        except FileNotFoundError:
            text = f"{path}: no authority here: run `liberatai ca init`"
            raise NotFoundError(text) from None
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}") from error
        return load(pem).public_bytes(serialization.Encoding.DER)

    def _signer(self, kind: Kind) -> Signer:
        if kind not in self._signers:
            path = self.folder / f"{kind}.key"
            try:
                key = key_of(path.read_bytes(), str(path))
            except FileNotFoundError:
                raise NotFoundError(f"{path}: the authority's key is not on this machine") from None
            except OSError as error:
                raise DiskError(f"{path}: {error.strerror}") from error
            self._signers[kind] = Signer(key, x509.load_der_x509_certificate(self.certificates[kind]))
        return self._signers[kind]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise DiskError(f"{self.folder}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _append(self, line: msgspec.Struct) -> None:
        path = self.folder / LIST
        try:
            if not path.exists() or path.stat().st_size > LARGE_BYTES:
                write_durably(path, b"".join(map(_line, self._kept(clock.wall()))))
            with path.open("r+b") as file:
                # After a crash the last line may be half a line: the next one begins anew.
                file.write(_line(line) if _ends_whole(file) else b"\n" + _line(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}") from error

    def _kept(self, now_s: float) -> Iterable[Issued]:
        return (one for one in self.issued() if one.end_s + KEPT_S > now_s)

    def _write_lists(self, issued: Sequence[Issued], now_s: float) -> None:
        for kind in KINDS:
            revoked = [
                (int(one.serial, 16), one.revoked_s)
                for one in issued
                if one.authority == kind and one.revoked_s is not None and one.end_s + KEPT_S > now_s
            ]
            path = self.folder / f"{kind}.crl"
            number = 1 + _number(path)
            try:
                listed = revocation_list(self._signer(kind), revoked, number, now_s)
                write_durably(path, listed, mode=0o644)
            except OSError as error:
                raise DiskError(f"{path}: {error.strerror}") from error


def _ends_whole(file: BinaryIO) -> bool:
    """Go to the end; say whether it is the end of a line."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _line(record: msgspec.Struct) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def _take(line: bytes, found: dict[str, Issued]) -> None:
    try:
        one = _ISSUED.decode(line)
        found[one.serial] = one
    except msgspec.MsgspecError:
        try:
            gone = _REVOKED.decode(line)
        except msgspec.MsgspecError:
            return  # half a line of a crash: nobody got that certificate
        if gone.revoked in found:
            before = found[gone.revoked]
            found[gone.revoked] = msgspec.structs.replace(before, revoked_s=gone.at_s, reason=gone.reason)


def _number(path: Path) -> int:
    try:
        listed = x509.load_pem_x509_crl(path.read_bytes())
        return listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except (OSError, ValueError, x509.ExtensionNotFound):
        return 0

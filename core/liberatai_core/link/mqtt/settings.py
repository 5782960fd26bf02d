"""How a broker is reached: one URL, a name and a password, files for TLS. Nothing here loads paho.

Files are read anew for every connection, so that a password or a certificate may be replaced while the
program runs.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

from liberatai_core.errors import CertificateError, ConfigError

if TYPE_CHECKING:
    from ssl import SSLContext

MAX_INCOMING_BYTES = 1 << 20  # four of the largest chunks; a hostile broker may announce 256 MB
MAX_PACKET_BYTES = 266_240  # the largest chunk (256 KiB) and 4 KiB of headers
IN_FLIGHT = 8  # unacknowledged messages: 8 chunks of 128 KiB are 1 MiB of memory
MAX_PASSWORD_BYTES = 65_535  # the length of a password is written as two bytes
NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which Python has no name for
DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """Files for TLS; `cert_file` and `key_file` make it mutual; no `ca_file`: the system's roots count.

    A certificate that came to be renewed lies beside the old one (`beside`), and takes its place when the
    broker has let it in: the link tries both in turn.

    Attributes:
        name: common name that the certificate must carry; "": any.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    name: str = ""

    @property
    def beside(self) -> Path | None:
        """Where a new certificate with its key lies until it is proven; None: these files are not renewed."""
        if self.cert_file is None or self.cert_file != self.key_file:
            return None
        return self.cert_file.with_name(f"{self.cert_file.stem}.next{self.cert_file.suffix}")

    def choose(self, *, beside: bool) -> "TlsSettings":
        """Return the settings of one attempt: with the new certificate, if it is wanted and there."""
        new = self.beside
        if not beside or new is None or not new.is_file():
            return self
        return replace(self, cert_file=new, key_file=new)

    def context(self) -> "SSLContext":
        """Read the files.

        Of a broker's certificate the dates count only where this clock may be right: a device without a
        battery-backed clock begins in 1970, and its own certificate shows that.

        Raises:
            ConfigError: one of them is missing, unreadable or wrong.
        """
        import ssl  # noqa: PLC0415 - 4 MiB for who speaks TLS only

        files = {name: getattr(self, name) for name in ("ca_file", "cert_file", "key_file")}
        absent = [
            f"{name}: no such file: {path}" for name, path in files.items() if path and not path.is_file()
        ]
        if absent:
            raise ConfigError("broker", absent)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        what = f"ca_file: {self.ca_file}"
        try:
            if self.ca_file is None:
                context.load_default_certs()
            else:
                context.load_verify_locations(self.ca_file)
            if self.cert_file is not None:
                what = f"cert_file, key_file: {self.cert_file}, {self.key_file}"
                context.load_cert_chain(self.cert_file, self.key_file)
                self._look_at_own(context)
        except OSError as error:  # ssl.SSLError is one
            text = error.reason if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigError("broker", [f"{what}: cannot be used: {text or error}"]) from None
        except CertificateError as error:
            raise ConfigError("broker", [f"cert_file: {error}"]) from None
        return context

    def _look_at_own(self, context: "SSLContext") -> None:
        from liberatai_core.certificate_file import read_dates, require_name  # noqa: PLC0415 - as ssl

        if self.cert_file is None:
            return
        dates = read_dates(self.cert_file)
        if self.name:
            require_name(dates, self.cert_file, self.name)
        if not dates.is_possible():
            context.verify_flags |= NO_CHECK_TIME


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """What a broker's URL says; `port` is never 0."""

    secure: bool
    host: str
    port: int
    username: str | None = None
    password: str | None = None


def broker_address(url: str) -> BrokerAddress:
    """Read `mqtt://user:password@host:port` or `mqtts://...`; the port may be missing.

    Raises:
        ConfigError: another scheme, no host, a bad port, or something behind the port.
    """
    where = "broker url"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(where, [f"{error}; write mqtt://host:port"]) from None
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise ConfigError(where, ["write mqtt://host:port or mqtts://host:port"])
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(where, ["nothing may follow the port"])
    if port == 0:
        raise ConfigError(where, ["port: must be 1 to 65535"])
    return BrokerAddress(
        secure=parts.scheme == "mqtts",
        host=parts.hostname,
        port=port or DEFAULT_PORTS[parts.scheme],
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
    )


def read_password(path: Path) -> str:
    """Return the first line of a password file.

    Raises:
        ConfigError: missing, unreadable, empty, longer than MQTT can say, or not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PASSWORD_BYTES + 2)
        password = data.splitlines()[0].decode("utf-8") if data.splitlines() else ""
    except OSError as error:
        text = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ConfigError("broker", [f"password_file: {text}: {path}"]) from None
    except UnicodeDecodeError:
        fault = f"password_file: {path}: not UTF-8 text: save it in that encoding"
        raise ConfigError("broker", [fault]) from None
    if not password or len(data.splitlines()[0]) > MAX_PASSWORD_BYTES:
        raise ConfigError("broker", [f"password_file: {path}: {'too long' if password else 'empty'}"])
    return password


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttSettings:
    """How to reach a broker.

    Attributes:
        host: name or address; with TLS the certificate must carry it.
        port: TCP port.
        client_id: identity of the session; two links with one id throw each other out.
        username: for brokers that know no certificates; amqtt loses messages of nameless clients.
        password: belongs to `username`.
        password_file: holds the password instead; read for every connection.
        keepalive_s: the broker publishes the will after 1.5 times this silence.
        tls: None for plain TCP.
        session_expiry_s: how long the broker keeps the session while we are away; 0 starts clean each time.
        receive_maximum: unacknowledged messages that the broker may send us (MQTT 5).
        max_packet_bytes: the largest packet, both ways.
        will_delay_s: MQTT 5: the broker waits so long with the will, so that short drops stay unseen.
        protocol: "auto" tries MQTT 5, then 3.1.1.
        reconnect_cap_s: upper end of the reconnect pause.
        urgent_cap_s: the same while something is at stake (see `link.Link.urgent`).
        spread_s: the first try after a loss comes within this time: a whole fleet loses its broker at once.
        connect_timeout_s: for name, TCP and TLS.
    """

    host: str
    port: int = 1883
    client_id: str
    username: str | None = None
    password: str | None = None
    password_file: Path | None = None
    keepalive_s: int = 60
    tls: TlsSettings | None = None
    session_expiry_s: int = 86_400
    receive_maximum: int = IN_FLIGHT
    max_packet_bytes: int = MAX_PACKET_BYTES
    will_delay_s: int = 0
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    reconnect_cap_s: float = 120.0
    urgent_cap_s: float = 15.0
    spread_s: float = 5.0
    connect_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        named = self.username is not None
        rules = {
            "host: must not be empty": bool(self.host),
            "port: must be 1 to 65535": 0 < self.port < 1 << 16,
            "client_id: must have 1 to 128 characters": 0 < len(self.client_id) <= 128,
            "password: needs a username": self.password is None or named,
            "password_file: needs a username": self.password_file is None or named,
            "keepalive_s: must be 1 to 65535": 0 < self.keepalive_s < 1 << 16,
            "session_expiry_s: must be 0 to 4294967295": 0 <= self.session_expiry_s < 1 << 32,
            "receive_maximum: must be 1 to 65535": 0 < self.receive_maximum < 1 << 16,
            "max_packet_bytes: must be 1024 to 1048576": 1024 <= self.max_packet_bytes <= MAX_INCOMING_BYTES,
            "will_delay_s: must be 0 to 4294967295": 0 <= self.will_delay_s < 1 << 32,
            "protocol: must be auto, 5 or 3.1.1": self.protocol in ("auto", "5", "3.1.1"),
            "reconnect_cap_s: must be positive": self.reconnect_cap_s > 0,
            "urgent_cap_s: must be positive": self.urgent_cap_s > 0,
            "spread_s: must be positive": self.spread_s > 0,
            "connect_timeout_s: must be positive": self.connect_timeout_s > 0,
        }
        faults = [fault for fault, kept in rules.items() if not kept]
        if faults:
            raise ConfigError("broker", faults)

    def __repr__(self) -> str:
        """Show where it leads, never the password."""
        user = f"{self.username}@" if self.username else ""
        scheme = "mqtt" if self.tls is None else "mqtts"
        return f"MqttSettings({scheme}://{user}{self.host}:{self.port}, client_id={self.client_id!r})"

    def secret(self) -> str | None:
        """Return the password as it is now; raises ConfigError when its file cannot be read."""
        return self.password if self.password_file is None else read_password(self.password_file)

    def check_files(self) -> None:
        """Read every file once, so that a program says at its start what is wrong; raises ConfigError."""
        faults: list[str] = []
        for read in (self.secret, self.tls.context if self.tls is not None else None):
            try:
                if read is not None:
                    read()
            except ConfigError as error:
                faults += error.faults
        if faults:
            raise ConfigError("broker", faults)

    @classmethod
    def from_url(cls, url: str, *, client_id: str, tls: TlsSettings | None = None) -> "MqttSettings":
        """Read a URL (see `broker_address`); mqtts:// is TLS with the system's roots unless `tls` is given.

        Use `dataclasses.replace` for everything else.

        Raises:
            ConfigError: a wrong URL, or `tls` with `mqtt://`.
        """
        address = broker_address(url)
        if not address.secure and tls is not None:
            fault = "certificates are given, but mqtt:// is plain TCP: write mqtts://"
            raise ConfigError("broker url", [fault])
        return cls(
            host=address.host,
            port=address.port,
            client_id=client_id,
            username=address.username,
            password=address.password,
            tls=(tls or TlsSettings()) if address.secure else None,
        )

    @classmethod
    def from_files(
        cls,
        url: str,
        *,
        client_id: str,
        username: str | None,
        password_file: str | None,
        ca_file: str | None,
        cert_file: str | None,
        key_file: str | None,
    ) -> "MqttSettings":
        """Put together what the settings of both programs say, and read every file once.

        Raises:
            ConfigError: with every fault, one line each.
        """
        ca, cert, key, password = (
            Path(name) if name is not None else None for name in (ca_file, cert_file, key_file, password_file)
        )
        tls = (
            TlsSettings(ca_file=ca, cert_file=cert, key_file=key, name=client_id)
            if ca or cert or key
            else None
        )
        settings = cls.from_url(url, client_id=client_id, tls=tls)
        if username is not None or password is not None:
            name = username or settings.username
            old = settings.password if password is None else None
            settings = replace(settings, username=name, password=old, password_file=password)
        settings.check_files()
        return settings

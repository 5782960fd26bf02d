"""What `doctor` says of the broker: name, port, TLS, login, rights, and whether a test word comes back.

Every step has its own words, so that what is wrong is named where it is wrong; all of them together take less
than three seconds, also where nobody answers.
"""

import asyncio
import contextlib
import secrets
import socket
import ssl
from dataclasses import dataclass, replace
from typing import Final

from liberatai_core.certificates import facts
from liberatai_core.contract.topics import ROOT
from liberatai_core.doctor.certificates import RENEW, TlsFiles
from liberatai_core.doctor.finding import Finding, fail, ok, warn
from liberatai_core.errors import BrokerRefusedError, CertificateError, ConfigError, LiberataiError
from liberatai_core.link.link import Connected, Disconnected, Received, Refused
from liberatai_core.link.mqtt import MqttLink, MqttSettings
from liberatai_core.units import date_text

NAME_S: Final = 2.0
REACH_S: Final = 1.0
TLS_S: Final = 1.0
ANSWER_S: Final = 1.0
WORD_S: Final = 1.0
ALERT_S, ALERT_AGAIN_S = 0.4, 1.5
"""How long a broker may take to say what it thinks of our certificate; longer once it has let nobody in."""
FOREIGN: Final = "a foreign certificate: use one that this fleet's authority issued"
CORRECT: Final = "correct broker: in the settings"

_ALERTS: Final = {
    "UNKNOWN_CA": "does not know who signed it",
    "CERTIFICATE_REVOKED": "says that it was revoked",
    "CERTIFICATE_EXPIRED": "says that it has expired",
    "BAD_CERTIFICATE": "does not take it",
    "CERTIFICATE_UNKNOWN": "does not take it",
    "UNSUPPORTED_CERTIFICATE": "does not take a certificate of this kind",
    "DECRYPT_ERROR": "does not believe its signature: another authority made it",
    "HANDSHAKE_FAILURE": "breaks off",
    "ACCESS_DENIED": "does not let it in",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What came of it.

    Attributes:
        findings: of every step that was tried.
        heard: what stood at the broker on the topics that were asked for: (topic, payload).
        connected: whether the broker let us in.
    """

    findings: tuple[Finding, ...]
    heard: tuple[tuple[str, bytes], ...] = ()
    connected: bool = False


async def reach(settings: MqttSettings, files: TlsFiles, word_topic: str, *filters: str) -> Reached:
    """Go to the broker, step by step; stop at the first that fails.

    Args:
        settings: how to reach it. The client id gets a suffix: a running program is not thrown out.
        files: of TLS, for the words.
        word_topic: where a test word is said and heard.
        filters: topics to listen to meanwhile.
    """
    found: list[Finding] = []
    for step in (_name, _port):
        one = await asyncio.to_thread(step, settings)
        if one is not None:
            return Reached(findings=(one,))
    if settings.tls is not None:
        one = await asyncio.to_thread(_handshake, settings, files)
        if one is not None:
            return Reached(findings=(one,))
        found.append(ok("broker", f"{settings.host}:{settings.port} speaks TLS, and takes our certificate"))
    reached = await _login(settings, word_topic, filters)
    if settings.tls is not None and not reached.connected:
        late = await asyncio.to_thread(_handshake, settings, files, ALERT_AGAIN_S)
        if late is not None:
            return Reached(findings=(late,))
    return replace(reached, findings=(*found, *reached.findings))


def _where(settings: MqttSettings) -> str:
    return f"{settings.host}:{settings.port}"


def _name(settings: MqttSettings) -> Finding | None:
    try:
        socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        text = f"no address for {settings.host!r} ({getattr(error, 'strerror', None) or error})"
        return fail("broker", text, f"{CORRECT}, or mend name resolution (/etc/hosts, DNS)")
    return None


def _port(settings: MqttSettings) -> Finding | None:
    try:
        socket.create_connection((settings.host, settings.port), timeout=REACH_S).close()
    except ConnectionRefusedError:
        text = f"{_where(settings)}: nobody listens there (connection refused)"
        return fail("broker", text, f"start it (`systemctl status mosquitto`), or {CORRECT}")
    except TimeoutError:
        text = f"{_where(settings)}: no answer"
        return fail("broker", text, f"is it on, is a firewall in between? Or {CORRECT}")
    except OSError as error:
        text = f"{_where(settings)}: {error.strerror or error}"
        return fail("broker", text, f"look at the network, or {CORRECT}")
    return None


# --- TLS ------------------------------------------------------------------------------------------


def _handshake(settings: MqttSettings, files: TlsFiles, alert_s: float = ALERT_S) -> Finding | None:
    """Return what speaks against a TLS connection; None: nothing does."""
    assert settings.tls is not None  # noqa: S101 - asked by who has looked
    try:
        context = settings.tls.context()
    except ConfigError as error:
        return fail("certificate", "; ".join(error.faults), "correct these files in the settings")
    try:
        with socket.create_connection((settings.host, settings.port), timeout=TLS_S) as plain:
            try:
                secure = context.wrap_socket(plain, server_hostname=settings.host)
            except (ConnectionError, TimeoutError):
                return _no_tls(settings)
            with secure:
                # TLS 1.3: what the broker thinks of our certificate is heard after the handshake. Whoever
                # speaks first may never hear it: the connection is reset.
                secure.settimeout(alert_s)
                secure.recv(1)
    except ssl.SSLCertVerificationError as error:
        return _distrusted(settings, files, error)
    except ssl.SSLError as error:
        return _refused(settings, files, error)
    except OSError:
        return None  # no word: it waits for ours
    return None


def _no_tls(settings: MqttSettings) -> Finding:
    text = f"{_where(settings)} does not speak TLS on this port"
    return fail("broker", text, "take the port with TLS (usually 8883), or write mqtt:// for plain TCP")


def _distrusted(settings: MqttSettings, files: TlsFiles, error: ssl.SSLCertVerificationError) -> Finding:
    """Say why the broker's certificate is not believed."""
    shown = _shown_by(settings)
    who = f"{_where(settings)} shows a certificate of {shown.issuer!r}" if shown else _where(settings)
    if error.verify_code == 62 or "mismatch" in str(error).lower():
        for_ = ", ".join(shown.hosts) if shown and shown.hosts else "other names"
        text = f"the broker's certificate is for {for_}, not for {settings.host!r}"
        remedy = f"reach it by one of those names, or `liberatai ca issue {settings.host} --role server`"
        return fail("broker", text, remedy)
    if error.verify_code == 10:
        until = f" on {date_text(shown.end_s)}" if shown else ""
        return fail("broker", f"the broker's certificate expired{until}", "renew it: `liberatai broker sync`")
    if error.verify_code == 9:
        since = f" before {date_text(shown.start_s)}" if shown else ""
        return fail("clock", f"the broker's certificate is not valid{since}", "set the clock (NTP)")
    trusted = f"ca_file {files.ca_file}" if files.ca_file else "the system's authorities"
    remedy = "ca_file must be the ca.crt of this fleet's authority"
    if not files.ca_file:
        remedy = f"name the fleet's ca.crt in ca_file ({error.verify_message})"
    return fail("authority", f"{who}, which {trusted} does not vouch for: a wrong CA", remedy)


def _shown_by(settings: MqttSettings) -> "_Shown | None":
    """Return what the broker's certificate says, believed or not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((settings.host, settings.port), timeout=TLS_S) as plain,
            context.wrap_socket(plain, server_hostname=settings.host) as secure,
        ):
            der = secure.getpeercert(binary_form=True)
        one = facts(der or b"")
    except (OSError, CertificateError):
        return None
    return _Shown(issuer=one.issuer, hosts=one.hosts or (one.name,), start_s=one.start_s, end_s=one.end_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    issuer: str
    hosts: tuple[str, ...]
    start_s: float
    end_s: float


def _refused(settings: MqttSettings, files: TlsFiles, error: ssl.SSLError) -> Finding:
    """Say why the broker does not believe our certificate, or does not speak TLS at all."""
    reason = str(error.reason or error)
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER" in reason or "UNEXPECTED_EOF" in reason:
        return _no_tls(settings)
    where = f"cert_file {files.cert_file}" if files.cert_file else "no cert_file is given"
    if "CERTIFICATE_REQUIRED" in reason or (files.cert_file is None and "HANDSHAKE" in reason):
        text = f"{_where(settings)} wants a certificate of ours, {where}"
        return fail("certificate", text, "name cert_file and key_file in the settings")
    told = next((words for part, words in _ALERTS.items() if part in reason), f"says {reason}")
    remedies = {
        "UNKNOWN_CA": FOREIGN,
        "DECRYPT_ERROR": FOREIGN,
        "CERTIFICATE_REVOKED": "if this device is still wanted: `liberatai devices invite`, and join anew",
        "CERTIFICATE_EXPIRED": RENEW,
    }
    remedy = next(
        (one for part, one in remedies.items() if part in reason), f"look at the broker's log; {RENEW}"
    )
    return fail("certificate", f"{where}: {_where(settings)} {told}", remedy)


def _speaks_tls(settings: MqttSettings) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        contextlib.suppress(OSError),
        socket.create_connection((settings.host, settings.port), timeout=TLS_S) as plain,
        context.wrap_socket(plain, server_hostname=settings.host),
    ):
        return True
    return False


# --- login and rights -----------------------------------------------------------------------------


async def _login(settings: MqttSettings, word_topic: str, filters: tuple[str, ...]) -> Reached:
    link = MqttLink(replace(settings, client_id=f"{settings.client_id}-doctor", session_expiry_s=0))
    word = secrets.token_bytes(8)
    heard: list[tuple[str, bytes]] = []
    refused: list[str] = []
    back = asyncio.Event()
    entered: asyncio.Future[Connected | Disconnected] = asyncio.get_running_loop().create_future()

    async def listen() -> None:
        async for event in link.events():
            match event:
                case Connected() | Disconnected():
                    if not entered.done():
                        entered.set_result(event)
                case Received(topic=topic, payload=payload, token=token):
                    link.ack(token)
                    if topic == word_topic:
                        if payload == word:
                            back.set()
                    elif len(heard) < 100:
                        heard.append((topic, payload))
                case Refused(what="subscribe", topic=topic) if f"{ROOT}/+/" not in topic:
                    refused.append(event.words)  # other fleets' topics may well be refused

    listening = asyncio.create_task(listen())
    try:
        with contextlib.suppress(LiberataiError):
            await link.subscribe(word_topic, *filters)
        await link.open()
        try:
            entry = await asyncio.wait_for(asyncio.shield(entered), ANSWER_S)
        except TimeoutError:
            entry = Disconnected(reason="it takes the connection and says nothing", retry_in_s=0.0)
        if isinstance(entry, Disconnected):
            return Reached(findings=(await _kept_out(settings, entry.reason),))
        told = ok("broker", f"{_where(settings)} lets {settings.client_id} in ({entry.protocol})")
        spoken = await _test_word(link, settings, word_topic, word, back)
        findings = [told, *([spoken] if spoken is not None else [])]
        findings += [
            fail("rights", line, "the broker's list of rights: `liberatai broker sync`") for line in refused
        ]
        return Reached(findings=tuple(findings), heard=tuple(heard), connected=True)
    finally:
        entered.cancel()
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await link.close()


async def _kept_out(settings: MqttSettings, reason: str) -> Finding:
    text = f"{_where(settings)}: {reason}"
    low = reason.lower()
    said_no = any(word in low for word in ("authori", "password", "banned"))
    if settings.tls is None and not said_no and await asyncio.to_thread(_speaks_tls, settings):
        text = f"{_where(settings)} speaks TLS, the settings say plain TCP"
        return fail("broker", text, "write broker: mqtts://… and name ca_file, cert_file, key_file")
    if "password" in low or "authori" in low or "identifier" in low:
        who = f"username {settings.username!r}" if settings.username else f"{settings.client_id!r}"
        remedy = "correct username and password_file, or let the broker know them"
        if settings.tls is not None:
            remedy = "it was shut out, or the broker's list lacks it: `liberatai devices show` says which"
        elif settings.username is None:
            remedy = (
                "the broker wants a login: give username and password_file, or certificates with mqtts://"
            )
        return fail("login", f"{_where(settings)} does not let {who} in: {reason}", remedy)
    return fail("broker", text, f"is it an MQTT broker? Look at its log, or {CORRECT}")


async def _test_word(
    link: MqttLink, settings: MqttSettings, topic: str, word: bytes, back: asyncio.Event
) -> Finding | None:
    """Say a word and hear it."""
    try:
        await asyncio.wait_for(link.publish(topic, word), WORD_S)
    except BrokerRefusedError as error:
        text = f"the broker's list of rights refuses {settings.client_id!r} on {topic}: {error}"
        remedy = (
            "name, certificate and fleet must be those that the list knows: `liberatai broker sync`; "
            "`liberatai devices show` says whether the device was shut out"
        )
        return fail("rights", text, remedy)
    except (TimeoutError, LiberataiError) as error:
        text = f"a test word on {topic} was not taken ({error or 'no answer'})"
        return fail("rights", text, "look at the broker's log")
    try:
        await asyncio.wait_for(back.wait(), WORD_S)
    except TimeoutError:
        text = f"a test word on {topic} was taken, but did not come back"
        return warn(
            "rights", text, "the list of rights lacks it, or denies this name: `liberatai broker sync`"
        )
    return ok("rights", "a test word was said and heard")

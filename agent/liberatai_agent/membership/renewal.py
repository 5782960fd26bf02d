"""Keeps the device's certificate valid: asks for a new one in time, over the connection that stands.

The new one lies beside the old one. The link tries it at the next connection, and puts it in the old one's
place when the broker has let it in; a broker that does not costs one attempt, and the old one goes on.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

from liberatai_agent.config import AgentConfig
from liberatai_agent.membership.asking import Question, keep, make_question, open_reply, refusal_of
from liberatai_agent.membership.identity import Identity
from liberatai_agent.membership.joining import EXPIRED
from liberatai_agent.store.files import set_aside
from liberatai_core.certificate_file import Dates, read_dates
from liberatai_core.contract.messages import CertificateReply
from liberatai_core.contract.topics import Topics
from liberatai_core.errors import CertificateError, ExpiredError, LiberataiError, LinkError
from liberatai_core.link.link import Link
from liberatai_core.link.mqtt.settings import TlsSettings

log = logging.getLogger(__name__)

LOOK_S = 3600.0
"""Between two looks at the certificate, at most."""
ANSWER_S = 60.0
FIRST_RETRY_S = 60.0
RETRY_SHARE = 1 / 30
"""Of the lifetime: the longest pause between two questions that were not answered; ten are left at least."""
SETTLE_S = 600.0
"""A clock that is set late has so long after the start before the coordinator is asked for the time."""
PROOF_S = 120.0
"""For the connection with the new certificate."""
LOOK_AGAIN_S = 0.05
NOT_YET_S = 2.0
TRIES = 3
"""A new certificate that the broker refused so often is set aside."""


class Renewal:
    """Renews for one device.

    Args:
        config: settings.
        identity: signs.
        topics: of the fleet.
        link: gives the link of now.
        connected: the connection that stands, None if none does; a new one is another object.
        failed: told (code, text) of what somebody should know.
        over: told that the certificate has ended: the agent has to join again.
    """

    def __init__(
        self,
        config: AgentConfig,
        identity: Identity,
        topics: Topics,
        link: Callable[[], Link],
        connected: Callable[[], object | None],
        failed: Callable[[str, str], None],
        over: Callable[[BaseException], None],
    ) -> None:
        self._config, self._identity, self._topics = config, identity, topics
        self._link, self._connected, self._failed, self._over = link, connected, failed, over
        self._own = Path(config.cert_file) if config.cert_file else None
        tls = TlsSettings(cert_file=self._own, key_file=Path(config.key_file) if config.key_file else None)
        self._beside = tls.beside
        self._question: Question | None = None
        self._reply: asyncio.Future[CertificateReply] | None = None
        self._started_s = time.monotonic()
        self._ahead_s = 0.0
        self._retries = 0
        self._read: tuple[int, Dates] | None = None
        self.renewed = 0

    @property
    def dates(self) -> Dates | None:
        """What the certificate says; None: there is none, or it cannot be read. Asked at every change."""
        if self._own is None:
            return None
        with contextlib.suppress(OSError, CertificateError):
            mark = self._own.stat().st_mtime_ns
            if self._read is None or self._read[0] != mark:
                self._read = mark, read_dates(self._own)
            return self._read[1]
        return None

    @property
    def _waits(self) -> bool:
        """Whether a new certificate lies beside the old one."""
        return self._beside is not None and self._beside.exists()

    def lost(self, reason: str) -> None:
        """Notice that the broker refuses our certificate because its time is over."""
        if EXPIRED in reason and self._config.claim_file is not None:
            self._over(ExpiredError("this device's certificate has ended: it asks for a new one"))

    def deliver(self, payload: bytes) -> None:
        """Take the answer to our question.

        Raises:
            LiberataiError: it is none.
        """
        if self._question is None or self._reply is None or self._reply.done():
            return
        self._reply.set_result(open_reply(self._config, payload, self._question))

    async def run(self) -> None:
        """Renew in time, for ever."""
        if self._own is None or self._beside is None:
            return
        while True:
            pause_s = LOOK_S
            try:
                pause_s = await self._look(self._own, self._beside)
                self._retries = 0
            except LiberataiError as error:
                pause_s = self._retry_s()
                self._complain(error)
            await asyncio.sleep(pause_s)

    def _retry_s(self) -> float:
        dates = self.dates
        longest_s = (dates.end_s - dates.start_s) * RETRY_SHARE if dates else LOOK_S
        self._retries += 1
        return min(longest_s, FIRST_RETRY_S * 2.0 ** (self._retries - 1)) * random.uniform(0.8, 1.2)  # noqa: S311 - no secret

    def _complain(self, error: LiberataiError) -> None:
        dates = self.dates
        left = f"; it is valid for {dates.days_left(self._now_s()):.1f} more days" if dates else ""
        if dates is None or dates.ends_soon(self._now_s()) or not isinstance(error, LinkError):
            self._failed(error.code, f"the certificate is not renewed: {error}{left}")
        else:
            log.info("the certificate is not renewed yet: %s%s", error, left)

    def _now_s(self) -> float:
        """Return the time of day, as the coordinator told it where our own clock cannot be right."""
        return time.time() + self._ahead_s

    async def _look(self, own: Path, beside: Path) -> float:
        """Do what is due; return how long there is nothing to do."""
        dates = read_dates(own)
        wait_s = 0.0 if self._waits else self._wait_s(dates)
        if wait_s > 0 or self._connected() is None:
            return min(LOOK_S, max(wait_s, NOT_YET_S))
        if not self._waits:
            await self._renew(beside)
        await self._prove(beside)
        return 0.1

    def _wait_s(self, dates: Dates) -> float:
        now_s = self._now_s()
        if dates.is_possible(now_s):
            return dates.renew_s - now_s
        # The broker has let us in, so it is the clock that is wrong: the coordinator knows better.
        return self._started_s + SETTLE_S - time.monotonic()

    async def _renew(self, beside: Path) -> None:
        topic = self._topics.provisioning(self._config.device, "crt")
        question = self._question = await make_question(self._config, self._identity)
        self._reply = asyncio.get_running_loop().create_future()
        try:
            await self._link().subscribe(topic)
            await self._link().publish(self._topics.provisioning(self._config.device, "csr"), question.frame)
            async with asyncio.timeout(ANSWER_S):
                reply = await self._reply
        except TimeoutError:
            raise LinkError("the coordinator does not answer (does it sign certificates: ca_dir?)") from None
        finally:
            self._question = self._reply = None
            await self._link().unsubscribe(topic)
        if reply.now_s:
            self._ahead_s = 0.0 if abs(reply.now_s - time.time()) < LOOK_S else reply.now_s - time.time()
        if reply.state != "issued":
            raise refusal_of(reply)
        await keep(self._config, question, reply, beside)
        log.info("a new certificate lies beside the old one")

    async def _prove(self, beside: Path) -> None:
        """Let the link connect with the new certificate."""
        for _ in range(TRIES):
            before = self._connected()
            if before is None:
                break
            await self._link().renew()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROOF_S):
                    while self._waits and self._is_down_or(before):  # noqa: ASYNC110
                        await asyncio.sleep(LOOK_AGAIN_S)
            if not self._waits:
                self.renewed += 1
                return
        if not self._waits:
            self.renewed += 1
        elif self._connected() is not None:
            aside = set_aside(beside)
            raise CertificateError(f"the broker does not take the new one, set aside as {aside.name}")
        else:
            raise LinkError("not connected; the new certificate waits beside the old one")

    def _is_down_or(self, before: object) -> bool:
        """Say whether there is no connection, or still the one of before: equal ones are not the same."""
        now = self._connected()
        return now is None or now is before

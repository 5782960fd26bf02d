"""Every limit of what crosses the broker, in one table, with the reason beside each number."""

from typing import Final

PROTOCOL_VERSION: Final = 1
"""The `v1` of every topic and the `1` of the magic. Another number is another protocol."""

MAX_PACKET_BYTES: Final = 266_240
"""256 KiB payload + 4 KiB topic and properties: below every broker's default (Mosquitto 2.1: 2 000 000)."""

CHUNK_BYTES: Final = 131_072
"""128 KiB: the payload that AWS IoT, EMQX, Mosquitto and rumqttd all take; 0.2 s at 5 Mbit/s."""

MAX_SINGLE_BYTES: Final = CHUNK_BYTES
"""A frame up to this size travels in one message, a longer one in chunks."""

MAX_CHUNKS: Final = 4096
"""512 MiB per object: more than any model of an edge device."""

MAX_OBJECT_BYTES: Final = 64 * 1024 * 1024
"""A whole update or blob. 64 MiB holds a 16 M parameter model in plain float32."""

MAX_CONTROL_BYTES: Final = 65_536
"""Control messages hold structures (≤ 4096 tensors) and chains, never weights."""

MAX_CHAIN: Final = 1024
"""Deltas after one keyframe; a keyframe is published long before."""

DIGEST_BYTES: Final = 16
"""Of the SHA-256 of weights, on the wire. Nobody finds other weights for a given name (2^128 tries); two that
share one (2^64) could only be made by the coordinator, which signs what it names anyway."""

MAX_SPEC_BYTES: Final = CHUNK_BYTES
"""What the tasks of a structure have in common: 4096 tensors, and one message."""

MAX_CLASSES: Final = 65_536
MAX_SAMPLES: Final = 10_000_000
"""Self-reported, so capped: one device must not outweigh a fleet. The job may cap lower."""

MAX_ROUND: Final = 1_000_000
MAX_SECONDS: Final = 30 * 86_400.0
"""No deadline or duration of a round is longer than a month."""

MAX_SESSION: Final = 2**52
"""Sessions of a device: half of what a counter holds, so whoever is told of so many can still go above."""

MAX_WORD_BYTES: Final = 1152
"""The frame of a coordinator's presence, carried inside another message."""

MAX_REQUEST_BYTES: Final = 2048
"""A request for a certificate with an EC key and one name has some 220 bytes."""

MAX_CERTIFICATE_BYTES: Final = 8192
"""Certificates of EC keys have some 500 bytes; authorities of others may have RSA keys."""
MAX_LINES: Final = 200
"""Of a log that travel at once: a control message full."""

MAX_TEXT: Final = 512
"""Reasons and names: one line on an operator's screen."""

WINDOW_CHUNKS: Final = 4
"""Chunks under way at once: 512 KiB of memory, at most half of Receive Maximum."""

OFFERS_PER_DEVICE: Final = 2
"""Uploads under way per device; a third one displaces the oldest, which a restarted device never finishes."""
